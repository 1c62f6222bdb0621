"""`onnx-adapt` and `python -m onnx_adapt`: the command line, which Ctrl-C ends at any time."""

from __future__ import annotations


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly even while it is being imported."""
    try:
        from onnx_adapt.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
