#!/usr/bin/env python3
"""Compiles the CUDA kernels on any Linux machine: no GPU, no driver and no CUDA toolkit are needed.

    compile.py ptx               rebuild kernels/cuda/ptx/*.ptx.gz and manifest.json where sources changed
    compile.py ptx --check       compile everything again and compare with what is committed
    compile.py fatbin            machine code for all architectures, for release builds (not committed)
    compile.py resources         rewrite kernels/cuda/ptx/resources.csv and print it
    compile.py resources NAME... the same of those files only
    compile.py resources --check compare with it; exits with 1 and the differing lines

The compilers come from NVIDIA's Python packages, pinned below, in virtual environments under target/; --nvrtc
and --nvcc name environments that exist already. What ships is compiled by NVRTC 12.8 (a driver refuses PTX
that is newer than itself); registers and spills are those of nvcc 13.0.

A file that has its own path on some architecture says so in a line such as `// architectures: 90a`.
"""

import argparse
import concurrent.futures
import ctypes
import difflib
import gzip
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
PTX = HERE / "ptx"
BUILD = HERE / "build"
MANIFEST = PTX / "manifest.json"
RESOURCES = PTX / "resources.csv"
ENVIRONMENTS = HERE.parent.parent / "target" / "cuda-compilers"

NVRTC_PACKAGES = ["nvidia-cuda-nvrtc-cu12==12.8.93"]
NVCC_PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
    # No 13.0 of this one; it reads the output of 13.0.
    "nvidia-cuda-cuobjdump==13.2.86",
    "nvidia-cuda-nvdisasm==13.5.37",
]
OPTIONS = ["--std=c++17"]
# The PTX that runs everywhere, and the architectures that get machine code.
GENERAL = "80"
ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
MNEMONICS = ["HMMA", "HGMMA", "LDGSTS", "LDL", "STL"]
COLUMNS = ["file", "kernel", "architecture", "registers", "stack", "spill_stores", "spill_loads", "static_shared"]
COLUMNS += [name.lower() for name in MNEMONICS] + ["sources"]
HASH_DIGITS = 12


# ---- Sources


def kernel_files():
    return sorted(HERE.glob("*.cu"))


def included(path, found=None):
    """The .cuh files that `path` includes, directly or not, by their path from here."""
    found = {} if found is None else found
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+\.cuh)"', path.read_text(), re.MULTILINE):
        if name not in found:
            found[name] = HERE / name
            included(HERE / name, found)
    return found


def source_hash(path):
    """SHA-256 of a .cu file and the .cuh files it includes, each with its name and length (as build.rs)."""
    digest = hashlib.sha256()
    for name, file in [(path.name, path)] + sorted(included(path).items()):
        data = file.read_bytes()
        digest.update(f"{name}\n{len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def own_architectures(path):
    match = re.search(r"^// architectures: (.*)$", path.read_text(), re.MULTILINE)
    return match.group(1).split() if match else []


# ---- Compilers


def environment(name, packages, given):
    """The folder of site packages of a virtual environment with `packages`, made if it is not there."""
    root = pathlib.Path(given) if given else ENVIRONMENTS / name
    if not given and not (root / "done").exists():
        print(f"installing {' '.join(packages)} into {root}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", root], check=True)
        pip = [root / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run(pip + packages, check=True)
        (root / "done").touch()
    sites = sorted(root.glob("lib/python3*/site-packages"))
    if not sites:
        sys.exit(f"{root} is no virtual environment")
    for package in packages:
        distribution, version = package.split("==")
        if not (sites[0] / f"{distribution.replace('-', '_')}-{version}.dist-info").exists():
            sys.exit(f"{root} lacks {package}")
    return sites[0]


class Rejected(Exception):
    """A source that does not compile."""


class Nvrtc:
    """The run-time compiler as a library."""

    def __init__(self, given):
        folder = environment("nvrtc", NVRTC_PACKAGES, given) / "nvidia" / "cuda_nvrtc" / "lib"
        # The compiler looks for this one by name only.
        ctypes.CDLL(str(folder / "libnvrtc-builtins.so.12.8"), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.version = NVRTC_PACKAGES[0].split("==")[1]

    def call(self, name, *arguments):
        result = getattr(self.library, name)(*arguments)
        if result != 0:
            raise RuntimeError(self.library.nvrtcGetErrorString(result).decode())

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, path, architecture, what):
        """`what`: "PTX" for the text of a virtual architecture, "CUBIN" for machine code."""
        headers = included(path)
        array = ctypes.c_char_p * len(headers)
        bodies = array(*(file.read_bytes() for file in headers.values()))
        names = array(*(name.encode() for name in headers))
        program = ctypes.c_void_p()
        source = path.read_bytes()
        # Sources are passed as text and by bare name: no path of this machine can get into the output.
        create = (ctypes.byref(program), source, path.name.encode(), len(headers), bodies, names)
        self.call("nvrtcCreateProgram", *create)
        kind = "compute" if what == "PTX" else "sm"
        options = [f"--gpu-architecture={kind}_{architecture}"] + OPTIONS
        options = [option.encode() for option in options]
        try:
            self.call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
        except RuntimeError as error:
            log = self.text(program, "ProgramLog").rstrip(b"\0").decode()
            raise Rejected(f"{log}\n{path.name} for {kind}_{architecture}: {error}") from None
        output = self.text(program, what)
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return output.rstrip(b"\0") if what == "PTX" else output


class Nvcc:
    """nvcc and the tools beside it."""

    def __init__(self, given):
        self.folder = environment("nvcc", NVCC_PACKAGES, given) / "nvidia" / "cu13" / "bin"

    def run(self, tool, *arguments):
        command = [self.folder / tool, *map(str, arguments)]
        path = {"PATH": f"{self.folder}:/usr/local/bin:/usr/bin:/bin"}
        done = subprocess.run(command, capture_output=True, text=True, env=path)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}{done.stderr}{tool} failed with {done.returncode}")
        return done


# ---- PTX and its manifest


def digest(data):
    return hashlib.sha256(data).hexdigest()


def read_manifest():
    try:
        return json.loads(MANIFEST.read_text())
    except FileNotFoundError:
        return {}


def ptx_files(path):
    """Where the PTX of a source lies, by architecture; the manifest has the hash of the text, not of the file."""
    return {name: PTX / f"{path.stem}.compute_{name}.ptx.gz" for name in [GENERAL, *own_architectures(path)]}


def read_ptx(file):
    return gzip.decompress(file.read_bytes()) if file.exists() else None


def ptx_digest(file):
    text = read_ptx(file)
    return None if text is None else digest(text)


def up_to_date(path, manifest):
    if manifest.get("sources", {}).get(path.name) != source_hash(path):
        return False
    hashes = manifest.get("ptx", {})
    digests = {file.name: ptx_digest(file) for file in ptx_files(path).values()}
    return all(text is not None and hashes.get(name) == text for name, text in digests.items())


def write_ptx(arguments):
    PTX.mkdir(exist_ok=True)
    nvrtc = Nvrtc(arguments.nvrtc)
    compiler = {"compiler": f"NVRTC {nvrtc.version}", "options": OPTIONS}
    old = read_manifest()
    if any(old.get(key) != value for key, value in compiler.items()):
        old = {}
    manifest = compiler | {"sources": {}, "ptx": {}}
    wrong = []
    for path in kernel_files():
        try:
            if not up_to_date(path, old):
                compile_ptx(nvrtc, path, write=not arguments.check)
            elif arguments.check and not compile_ptx(nvrtc, path, write=False):
                wrong.append(path.name)
        except Rejected as error:
            print(error, file=sys.stderr)
            wrong.append(path.name)
            continue
        manifest["sources"][path.name] = source_hash(path)
        for file in ptx_files(path).values():
            manifest["ptx"][file.name] = ptx_digest(file)
    if arguments.check and manifest != old:
        wrong.append(MANIFEST.name)
    if not arguments.check:
        for file in PTX.glob("*.ptx*"):
            if file.name not in manifest["ptx"]:
                file.unlink()
        MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")
    if wrong:
        sys.exit(f"not what the sources compile to: {', '.join(wrong)}")


def compile_ptx(nvrtc, path, write):
    """Compiles a file for its architectures; whether all of it is what lies there (now, if it is written)."""
    same = True
    for architecture, file in ptx_files(path).items():
        text = nvrtc.compile(path, architecture, "PTX")
        if write and read_ptx(file) != text:
            # Without the time, so that the same text is the same file.
            file.write_bytes(gzip.compress(text, mtime=0))
            print(f"{file.name}: {len(text)} bytes of text")
        same = same and read_ptx(file) == text
    return same


# ---- Machine code


def write_fat_binaries(arguments):
    nvrtc, nvcc = Nvrtc(arguments.nvrtc), Nvcc(arguments.nvcc)
    BUILD.mkdir(exist_ok=True)
    sources = {}
    for path in kernel_files():
        output = BUILD / f"kernels-{path.stem}.fatbin"
        with tempfile.TemporaryDirectory() as folder:
            images = []
            for architecture in ARCHITECTURES:
                cubin = pathlib.Path(folder) / f"{architecture}.cubin"
                cubin.write_bytes(nvrtc.compile(path, architecture, "CUBIN"))
                images.append(f"--image3=kind=elf,sm={architecture},file={cubin}")
            nvcc.run("fatbinary", "-64", f"--create={output}", "--compress-mode=size", *images)
        sources[path.name] = source_hash(path)
        print(f"{output.name}: {output.stat().st_size} bytes")
    (BUILD / "manifest.json").write_text(json.dumps({"sources": sources}, indent=2) + "\n")


# ---- Registers, spills, instructions


def measure(nvcc, path, architecture):
    """One row per kernel of a file, as the compiler and the disassembler tell it."""
    generate = f"arch=compute_{architecture},code=sm_{architecture}"
    options = ["-std=c++17", "-O3", "-gencode", generate, "-Xptxas", "-v", "-cubin", "-I", HERE]
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        log = nvcc.run("nvcc", *options, path, "-o", cubin).stderr
        assembly = nvcc.run("cuobjdump", "--dump-sass", cubin).stdout
    rows = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]

        def number(pattern):
            match = re.search(pattern, part)
            return int(match.group(1)) if match else 0

        rows[name] = {
            "file": path.stem,
            "kernel": name,
            "architecture": architecture,
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"),
            "static_shared": number(r"(\d+) bytes smem"),
            "sources": source_hash(path)[:HASH_DIGITS],
        }
    for part in re.split(r"^\s*Function : ", assembly, flags=re.MULTILINE)[1:]:
        row = rows[part.split()[0]]
        mnemonics = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(\w+)", part, re.MULTILINE)
        for name in MNEMONICS:
            row[name.lower()] = mnemonics.count(name)
    return [rows[name] for name in sorted(rows)]


def known_rows(files):
    """The committed rows of each file and architecture whose sources are the same or, with `files`, of all others."""
    known = {}
    for line in RESOURCES.read_text().splitlines()[1:] if RESOURCES.exists() else []:
        row = dict(zip(COLUMNS, line.split(",")))
        path = HERE / f"{row['file']}.cu"
        if not path.exists():
            continue
        if row["sources"] == source_hash(path)[:HASH_DIGITS] or (files and path.stem not in files):
            known.setdefault((path, row["architecture"]), []).append(row)
    return known


def table(arguments):
    nvcc = Nvcc(arguments.nvcc)
    known = {} if arguments.check else known_rows(arguments.files)
    work = [(path, architecture) for path in kernel_files() for architecture in ARCHITECTURES]
    # Of files that were not asked for: what is known, if anything is.
    work = [unit for unit in work if unit in known or not arguments.files or unit[0].stem in arguments.files]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        rows = pool.map(lambda unit: known.get(unit) or measure(nvcc, *unit), work)
    lines = [",".join(COLUMNS)]
    lines += [",".join(str(row.get(column, 0)) for column in COLUMNS) for part in rows for row in part]
    return "".join(line + "\n" for line in lines)


def resources(arguments):
    new = table(arguments)
    old = RESOURCES.read_text() if RESOURCES.exists() else ""
    if arguments.check:
        names = (str(RESOURCES.relative_to(HERE)), "compiled now")
        difference = list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, n=0, lineterm=""))
        if difference:
            sys.exit("\n".join(difference))
        print(f"{RESOURCES.name}: {new.count(chr(10)) - 1} rows as committed")
        return
    RESOURCES.write_text(new)
    cells = [line.split(",") for line in new.splitlines()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["ptx", "fatbin", "resources"])
    parser.add_argument("files", nargs="*", metavar="NAME", help="files without .cu (of resources only)")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--nvrtc", metavar="DIR", help="a virtual environment with NVRTC 12.8")
    parser.add_argument("--nvcc", metavar="DIR", help="a virtual environment with nvcc 13.0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers that run at once")
    arguments = parser.parse_args()
    try:
        {"ptx": write_ptx, "fatbin": write_fat_binaries, "resources": resources}[arguments.command](arguments)
    except Rejected as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
