"""Images with a class for every pixel, or with objects: files, transforms, batches and scores."""
