"""A user's own DeepSpeed file as JSON. Nothing here imports DeepSpeed."""

from pathlib import Path

from launch.common.errors import Reject, UserError
from launch.common.strict_json import StrictDecoder


def read_file(path: str) -> dict:
    """Read the file's JSON object. Raises `UserError` if it is not an object, or repeats a key."""
    if not path:
        raise UserError("--deepspeed is empty; name a file, or leave it out")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        config, end, reject = StrictDecoder().decode_at(text)
    except (OSError, ValueError, Reject) as error:
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path}: expected a JSON object, got {type(config).__name__}")
    if reject or text[end:]:
        reason = reject or "there is text after the object"
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {reason}")
    return config
