"""Starts a web page and prints its address: draw images, compare tuners and LoRAs, train a tuner, manage the files.

python app.py
python app.py --base path/to/sd-v1-5 --output output
"""

import argparse
import os
import signal
import sys
import threading

from sdtune import extras
from sdtune.training import launch


def main() -> int:
    args = parse_args()
    extras.require("page")
    print(f"loading the base {args.base} ...", flush=True)

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing is sent to Gradio
    launch.silence_libraries()

    from sdtune import BaseError
    from sdtune.kernels.cpu.heap import keep_freed_memory
    from sdtune.page import layout
    from sdtune.page.backend import Backend
    from sdtune.training.signals import SIGNALS

    keep_freed_memory()
    try:
        backend = Backend(args.base, args.output)
    except (BaseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stop = threading.Event()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda *_: stop.set())
    try:
        login = tuple(args.auth.split(":", 1)) if args.auth else None
        page, urls = layout.launch(backend, args.server_name, args.port, args.share, login)
        print(f"the page is at {' and '.join(urls)} (Ctrl+C stops it)", flush=True)
        stop.wait()
        page.close(verbose=False)
    except OSError as error:
        print(f"error: {error}; choose another --port or --server-name", file=sys.stderr)
        return 1
    finally:
        backend.queue.close()
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--base", default="tiny-sd", help="tiny-sd, a diffusers folder, a .safetensors checkpoint, or a hub id"
    )
    parser.add_argument(
        "--output", default="output", help="folder for trainings, images and uploads; nothing is written elsewhere"
    )
    parser.add_argument(
        "--server-name", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other computers in"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--share", action="store_true", help="also make a public link through Gradio's servers")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for this user name and password")
    args = parser.parse_args()
    if not 0 <= args.port < 65536:
        parser.error(f"--port is {args.port}; expected a number from 0 to 65535")
    if args.auth and not all(args.auth.partition(":")):
        parser.error(f"--auth is {args.auth!r}; expected USER:PASSWORD")
    return args


if __name__ == "__main__":
    sys.exit(main())
