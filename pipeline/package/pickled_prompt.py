"""Soft prompts that PyTorch has saved: pickles, which this process never opens.

Another process reads them, with bounds on its memory and time, and a reader that calls nothing the file names; it gives
back one dense tensor, which is checked here as if it came from a stranger.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.errors import AdapterError
from pipeline.package import pickled_prompt_child
from pipeline.package.weights import check_finite, read_safetensors_header

PICKLE_SUFFIXES = (".pt", ".bin", ".pth")
MAX_FILE_BYTES = 256 << 20
SECONDS = 30.0
_HINT = 'Save the tensor with safetensors.torch.save_file({"prompt": tensor}, path) and pack the expert again.'


def read_pickled_prompt(path: Path, num_positions: int, *, source: str) -> bytes:
    """A soft prompt of PyTorch's form as a safetensors file with one tensor, `prompt`.

    Args:
        path: The file.
        num_positions: What the manifest says: the tensor has shape [num_positions, hidden_size].
        source: The package, as messages name it.

    Raises:
        AdapterError: It holds something other than one dense, finite tensor of that shape, or takes too much to read.
    """

    def refused(detail: str) -> AdapterError:
        return AdapterError(f"the soft prompt {path.name} in {source} cannot be used", hint=_HINT, details=[detail])

    if path.stat().st_size > MAX_FILE_BYTES:
        raise refused(f"it has {path.stat().st_size:,} bytes; {MAX_FILE_BYTES:,} are allowed")
    command = [sys.executable, "-I", "-S", pickled_prompt_child.__file__, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, env={}, cwd="/")  # noqa: S603
    except subprocess.TimeoutExpired as problem:
        raise refused(f"it took more than {SECONDS:.0f} seconds to read") from problem
    if done.returncode != 0:
        why = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:300]
        raise refused(why or f"its reader was ended ({done.returncode}): it took too much memory or time")
    with tempfile.TemporaryDirectory(prefix="expert-prompt-") as scratch:
        copy = Path(scratch) / f"{path.stem}.safetensors"
        copy.write_bytes(done.stdout)
        tensors = read_safetensors_header(copy, source=source)
        check_finite(copy, tensors, source=source)
        prompt_width(copy, num_positions, source=source)
    return done.stdout


def prompt_width(path: Path, num_positions: int, *, source: str) -> int:
    """The width of a soft prompt in safetensors: its one tensor has shape [num_positions, width].

    Raises:
        AdapterError: The file is not valid safetensors, or holds something else.
    """
    tensors = read_safetensors_header(path, source=source)
    if len(tensors) != 1 or len(tensors[0].shape) != 2 or tensors[0].shape[0] != num_positions:
        shapes = [list(tensor.shape) for tensor in tensors]
        raise AdapterError(
            f"the soft prompt {path.name} in {source} cannot be used",
            hint="It needs one tensor of shape [tokens, hidden_size].",
            details=[f"it holds {shapes}, and the manifest says {num_positions} tokens"],
        )
    return tensors[0].shape[1]
