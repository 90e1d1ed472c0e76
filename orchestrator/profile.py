"""Profile text to desired state, or every problem in it with its place."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Problem, ProfileError
from orchestrator.model import Desired

if TYPE_CHECKING:
    from orchestrator.choose import Describe
    from orchestrator.profile_schema import ProfileDoc
    from orchestrator.yamltext import Path, Tree

# Without these an entry means something else, so what is wrong with the rest of it cannot be told.
_DECIDES_THE_ENTRY = ("use", "engine")


def no_description(_use: str) -> None:
    """For profiles that use no helpers but ours."""
    return


def load_file(path: str | pathlib.Path, describe: Describe = no_description) -> Desired:
    """Load a profile from a file; raises ProfileError, also if it cannot be read.

    `describe` is asked about helpers that the catalogue does not have.
    """
    source = str(path)
    try:
        raw = pathlib.Path(path).read_bytes()
    except IsADirectoryError as error:
        hint = "name one of the files in it"
        raise ProfileError((Problem(source, 0, 0, "this is a directory, not a profile", hint),)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ProfileError((Problem(source, 0, 0, f"cannot be read: {reason}"),)) from error
    return load(raw, source, describe, directory=str(pathlib.Path(path).absolute().parent))


def load(
    text: str | bytes, source: str, describe: Describe = no_description, *, directory: str | None = None
) -> Desired:
    """Load a profile from its text; `source` is what problems call it. Raises ProfileError with every problem found.

    Files of helpers are relative to the absolute path `directory`; without one, relative names are a problem.
    """
    from orchestrator import yamltext
    from orchestrator.choose import Own
    from orchestrator.resolve import resolve

    tree = yamltext.parse(yamltext.decode(text, source) if isinstance(text, bytes) else text, source)
    document, incomplete = _document(tree)
    own = Own(describe, directory)
    desired = resolve(tree, document, incomplete=incomplete, own=own) if document is not None else None
    if tree.problems or desired is None:
        raise ProfileError(tuple(dict.fromkeys(tree.problems)))
    return desired


def schema() -> dict[str, Any]:
    """The JSON Schema of a profile, for editors."""
    from orchestrator.profile_schema import ProfileDoc

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **ProfileDoc.model_json_schema()}


def _document(tree: Tree) -> tuple[ProfileDoc | None, frozenset[str]]:
    """The typed document, and the helpers of which a part was left out because something is wrong with it.

    What is wrong is reported and cut out, so that the rest can still be looked at; None if nothing is left.
    """
    from pydantic import ValidationError

    from orchestrator.profile_schema import ProfileDoc, explain

    if not isinstance(tree.data, dict):
        _report_root(tree)
        return None, frozenset()
    try:
        return ProfileDoc.model_validate(tree.data), frozenset()
    except ValidationError as error:
        paths = [details["loc"] for details in error.errors()]
        for details in error.errors():
            tree.report(details["loc"], *explain(details), of_key=details["type"] == "extra_forbidden")
    try:
        pruned = _prune(tree.data, paths)
        return ProfileDoc.model_validate(pruned), frozenset(str(p[1]) for p in paths if p[0] == "helpers" and p[1:])
    except ValidationError:
        return None, frozenset()


def _report_root(tree: Tree) -> None:
    hint = "for example `profile: office-edge` and `helpers: {ftp: {}}`"
    if tree.data is None:
        tree.report((), "the profile is empty", hint)
    else:
        tree.report((), "a profile is a mapping of keys to values", hint)


def _prune(data: dict[str, Any], paths: list[Path]) -> dict[str, Any]:
    """The data without the keys, of profile and helpers, that are wrong; a wrong attach entry becomes an empty one."""
    cut = {_cut_path(path) for path in paths}
    pruned = {key: value for key, value in data.items() if (key,) not in cut}
    pruned.setdefault("profile", "unnamed")
    if "helpers" in pruned:
        pruned["helpers"] = {
            name: _prune_helper(name, helper, cut)
            for name, helper in pruned["helpers"].items()
            if ("helpers", name) not in cut
        }
    return pruned


def _prune_helper(name: str, helper: dict[str, Any], cut: set[Path]) -> dict[str, Any]:
    kept = {key: value for key, value in helper.items() if ("helpers", name, key) not in cut}
    if isinstance(kept.get("attach"), list):
        entries = enumerate(kept["attach"])
        kept["attach"] = [{} if ("helpers", name, "attach", index) in cut else entry for index, entry in entries]
    elif ("helpers", name, "attach", 0) in cut:
        kept["attach"] = {}
    return kept


def _cut_path(path: Path) -> Path:
    if path[0] != "helpers":
        return path[:1]
    if len(path) > 2 and path[2] in _DECIDES_THE_ENTRY:
        return path[:2]
    return path[:4] if path[2:3] == ("attach",) else path[:3]
