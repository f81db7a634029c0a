# docker build -t pretraining . && docker run pretraining        the quickstart
# docker run pretraining bash scripts/test.sh                    the tests
# docker run --gpus all --shm-size 16g -v DATA:/data pretraining python -m saim.main_pretrain --data_path /data
FROM python:3.12
WORKDIR /pretraining
COPY . .
# dev: what the tests need, too
RUN pip install --no-cache-dir --editable ".[dev]"
CMD ["bash", "scripts/quickstart.sh"]
