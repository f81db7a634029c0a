"""What belongs together in the authors' repositories and here, and what differs on purpose: upstream/<method>.json."""

import json
from pathlib import Path
from typing import Any

from common.distributed import UserError

TOOLS = Path(__file__).resolve().parent
Dict = dict[str, Any]


def read_record(method: str) -> Dict:
    """upstream/<method>.json, its repositories completed by those that they are like."""
    record = json.loads((TOOLS / "upstream" / f"{method}.json").read_text("utf-8"))
    by_name: dict[str, Dict] = {}
    for repository in record["repositories"]:
        other = by_name.get(repository.get("like", ""), {})
        by_name[repository["name"]] = repository
        for key in ("files", "flags", "definitions", "configs"):
            repository[key] = {**other.get(key, {}), **repository.get(key, {})}
        for file, part in repository["flags"].items():
            if "more" in part:
                part |= {**other["flags"][file], "names": other["flags"][file]["names"] + part["more"]}
        for names in repository["definitions"].values():
            names |= {name: {"here": here} for name, here in names.items() if isinstance(here, str)}
    return record


def differences(record: Dict) -> list[dict[str, str]]:
    """All differences in behaviour, first those of SAIM's that hold for the method, too."""
    return [*shared_differences(record), *record["differences"]]


def shared_differences(record: Dict) -> list[dict[str, str]]:
    """The differences of SAIM's that the record names; raises UserError for a name that none has."""
    saim = {d["id"]: d for d in json.loads((TOOLS / "upstream" / "saim.json").read_text("utf-8"))["differences"]}
    unknown = [name for name in record.get("shared", []) if name not in saim]
    if unknown:
        raise UserError(f"shared: {unknown[0]} is no id of a difference in upstream/saim.json")
    return [saim[name] for name in record.get("shared", [])]
