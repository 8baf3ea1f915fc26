"""Runs the tests of the C library in the guest, and prints what Rust's test harness prints: cargo xtask test c.

    run.py FOLDER RUST PYTHON

FOLDER has the programs, RUST is the example kv_cache, and PYTHON an interpreter with the Python package, or empty.
"""

import os
import pathlib
import subprocess
import sys
import time

folder, rust, python = sys.argv[1:]
HERE = pathlib.Path(__file__).parent
ADDRESS = "192.168.77.2"
# Layers, pages of each, bytes of a page.
SIZES = ["3", "24", "4096"]
TIMEOUT = 240
VALGRIND = ["valgrind", "--quiet", "--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite", "--error-exitcode=9"]
# libibverbs' structs for the kernel have padding, which Debian's build does not announce to valgrind as defined.
VALGRIND += ["--undef-value-errors=no"]


def program(name):
    """Compiled with AddressSanitizer."""
    return [f"{folder}/{name}"]


def plain(name):
    return [f"{folder}/plain/{name}"]


class Failed(Exception):
    pass


def start(command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process, words=""):
    said, _ = process.communicate(timeout=TIMEOUT)
    if process.returncode or words not in said:
        raise Failed(f"{process.args} ended with {process.returncode}, without {words!r}:\n{said}")


def alone(command, words=""):
    def run(_port):
        ended(start(command), words)

    return run


def pair(listening, connecting, received, sent):
    """Two processes. The commands are functions of the port."""

    def run(port):
        first = start(listening(port))
        try:
            line = first.stdout.readline()
            if not line.startswith("listening"):
                raise Failed(line + first.stdout.read())
            second = start(connecting(port))
            try:
                ended(second, sent)
            except Failed as error:
                first.kill()
                raise Failed(f"{error}\nIts peer said:\n{line}{first.communicate()[0]}")
            finally:
                second.kill()
                second.wait()
            ended(first, received)
        finally:
            first.kill()
            first.wait()

    return run


def in_c(role):
    return lambda port: program("kv_cache") + [role, ADDRESS, port] + SIZES


def in_python(role):
    return lambda port: [python, str(HERE / "peer.py"), role, ADDRESS, port] + SIZES


def in_rust(role):
    address = {"decode": "--listen", "prefill": "--connect"}[role]
    options = ["--port", "--layers", "--pages", "--page-size"]
    return lambda port: [rust, role, address, ADDRESS] + sum(map(list, zip(options, [port] + SIZES)), [])


def pushed(one, other):
    return pair(one("decode"), other("prefill"), "received 3 layers of 24 pages, verified", "pushed 3 layers of 24 pages")


def example(name):
    command = lambda role: lambda port: program(name) + [role, f"{ADDRESS}:{port}"]
    return pair(command("receive"), command("send"), "verified", "wrote")


def every_function_is_refused():
    """Each exported function is called in the tests of refusals."""
    symbols = (HERE / "../../docs/api/libdmabuf_rdma.txt").read_text().split("\n")[1:]
    tests = (HERE / "refusals.c").read_text()
    missing = [symbol for symbol in symbols if symbol and f"{symbol}(" not in tests]
    if missing:
        raise Failed(f"refusals.c lacks {missing}")


TESTS = {
    "every_function_is_refused": lambda _port: every_function_is_refused(),
    "asan::refusals": alone(program("refusals")),
    "asan::transfers": alone(program("transfers")),
    "asan::foreign": alone(program("foreign")),
    "asan::from_cpp": alone(program("from_cpp"), "place for the new drdma_remote"),
    "asan::static": alone(program("transfers_static")),
    "examples::write_dmabuf": example("write_dmabuf"),
    "examples::write_gpu": example("write_gpu"),
    "examples::event_loop": example("event_loop"),
    "interop::c_to_c": pushed(in_c, in_c),
    "interop::c_to_rust": pushed(in_rust, in_c),
    "interop::rust_to_c": pushed(in_c, in_rust),
    "interop::c_to_python": pushed(in_python, in_c),
    "interop::python_to_c": pushed(in_c, in_python),
}

# It takes as long as all others together: it starts first, and is judged last.
SLOW = {"valgrind::refusals": VALGRIND + plain("refusals")}


def main():
    os.environ["ASAN_OPTIONS"] = "detect_leaks=1:abort_on_error=0"
    os.environ["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1"
    chosen = {name: test for name, test in TESTS.items() if python or "python" not in name}
    slow = {name: start(command) for name, command in SLOW.items()}
    chosen |= {name: lambda _port, process=process: ended(process) for name, process in slow.items()}
    print(f"\nrunning {len(chosen)} tests", flush=True)
    failures = 0
    for number, (name, test) in enumerate(chosen.items()):
        begin = time.monotonic()
        try:
            test(str(7500 + number))
            verdict = "ok"
        except (Failed, subprocess.TimeoutExpired, OSError) as error:
            print(error, flush=True)
            verdict = "FAILED"
            failures += 1
        print(f"{name} took {time.monotonic() - begin:.1f} s")
        print(f"test c::{name} ... {verdict}", flush=True)
    word = "FAILED" if failures else "ok"
    passed = len(chosen) - failures
    print(f"\ntest result: {word}. {passed} passed; {failures} failed; 0 ignored; 0 measured; 0 filtered out", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
