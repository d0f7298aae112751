"""Train twice on a disk that is too small, then once more when it has grown.

python full_disk.py DISK COPY BYTES OPTION...    DISK: an empty folder that a disk is mounted on

The options are those of ``bstriplet train``. A checkpoint is written every epoch. At the end the
run is copied to COPY, because the disk ends with this process. Run it in a mount namespace.
"""

import shutil
import subprocess
import sys
from pathlib import Path

NO_DISK = 77  # the exit status if no disk can be mounted


def main(disk: Path, copy: Path, size: str, options: list[str]) -> int:
    """Return 0 if the first two attempts fail alike and the third succeeds."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return NO_DISK

    import torch
    from bstriplet import cli
    from bstriplet.report import page
    from bstriplet.training import progress, run_folder

    torch.set_num_threads(1)
    progress.CHECKPOINT_SHARE = float("inf")
    page.write_report = lambda folder: folder
    run = disk / "run"
    command = ["train", *options, "--out", str(run), "--resume"]
    for _ in range(2):
        if cli.main(command) != 2:
            return 1
        run_folder.load_checkpoint(run / run_folder.LAST_FILE)
        left_over = {path.name for path in run.glob(".*")} - {run_folder.LOCK_FILE}
        if left_over:
            print(f"left over: {left_over}", file=sys.stderr)
            return 1
    subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
    status = cli.main(command)
    shutil.copytree(run, copy)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]))
