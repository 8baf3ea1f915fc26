//! `cargo xtask test c`: the C library, installed in a staging folder, and programs in C and C++ that use it in a guest.
//!
//! It is a suite of its own. `capi/tests/run.py` runs the programs, and prints what Rust's test harness prints.

use super::integration::guest_for_tests;
use super::libtest::Report;
use super::{Args, Summary, python, shown};
use crate::api;
use crate::cargo;
use crate::guest::Job;
use crate::host::{self, Need};
use crate::kernel::rxe::Rxe;
use crate::size::Size;
use crate::{lock, process, project, ui};
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Programs of the tests and the examples, each with a source and what the linker needs besides.
const TESTS: &[(&str, &[&str])] =
    &[("refusals", &[]), ("transfers", &[]), ("foreign", &["-libverbs"]), ("kv_cache", &[])];
const EXAMPLES: &[(&str, &[&str])] = &[("write_dmabuf", &[]), ("write_gpu", &["-ldl"]), ("event_loop", &[])];

const STRICT: &[&str] = &["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-pthread"];
const SANITIZED: &[&str] = &["-fsanitize=address,undefined", "-fno-omit-frame-pointer"];

pub(super) fn run(args: &Args, summary: &mut Summary) -> Result<()> {
    host::ensure(&[Need::C, Need::Python])?;
    let home = project::target().join("capi");
    let (mut example, mut python) = (PathBuf::new(), PathBuf::new());
    super::step(summary, "Build of the C library and its programs", || {
        let staged = Staged::new(&home)?;
        staged.check_symbols()?;
        staged.check_header()?;
        staged.compile_all()?;
        // Peers in other languages.
        example = cargo::executable(&["build", "--example", "kv_cache"], "kv_cache")?;
        python = python::installed()?;
        Ok(())
    })?;
    let start = Instant::now();
    let words = ["python3", "-u", "capi/tests/run.py"].map(String::from);
    let arguments =
        [&home.join("programs"), &example, &python].map(|path| path.to_string_lossy().into_owned());
    let mut job = Job::new([words.to_vec(), arguments.to_vec()].concat())?.for_tests();
    job.directory = project::root().to_path_buf();
    let guest = guest_for_tests(args, Rxe::Dmabuf, Size::gib(3))?;
    let outcome = guest.run(&job.library_path(&home.join("stubs")))?;
    crate::vm::report(&outcome);
    let report = Report::parse(&outcome.stdout);
    let took = ui::seconds(start.elapsed());
    if outcome.success() {
        ui::note("ok", &format!("C: {} passed in {took}", report.passed));
    } else {
        ui::error(&format!("C: {} failed after {took}", report.failed));
        if report.failed == 0 {
            summary.broken.push("C".into());
        }
    }
    summary.add(&report);
    Ok(())
}

/// The library as an installation has it.
struct Staged {
    home: PathBuf,
}

impl Staged {
    fn new(home: &Path) -> Result<Self> {
        let mut build = project::cargo();
        // The linker's flags come from `capi/build.rs`, and the libraries that a static one needs from rustc.
        build.args([
            "rustc",
            "--package",
            "dmabuf-rdma-capi",
            "--lib",
            "--",
            "--print",
            "native-static-libs",
        ]);
        let private = native_libraries(&mut build)?;
        lock::remove(home)?;
        let (lib, include) = (home.join("lib"), home.join("include"));
        for folder in [&lib.join("pkgconfig"), &include, &home.join("programs/plain"), &home.join("stubs")] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let version = env!("CARGO_PKG_VERSION");
        let minor = minor();
        let built = project::target().join("debug");
        fs::copy(built.join("libdmabuf_rdma_capi.so"), lib.join(format!("libdmabuf_rdma.so.{version}")))?;
        fs::copy(built.join("libdmabuf_rdma_capi.a"), lib.join("libdmabuf_rdma.a"))?;
        symlink(format!("libdmabuf_rdma.so.{version}"), lib.join(format!("libdmabuf_rdma.so.{minor}")))?;
        symlink(format!("libdmabuf_rdma.so.{minor}"), lib.join("libdmabuf_rdma.so"))?;
        fs::copy(project::root().join(api::c::HEADER), include.join("dmabuf_rdma.h"))?;
        let home = home.to_path_buf();
        let description = format!(
            "prefix={}\nlibdir=${{prefix}}/lib\nincludedir=${{prefix}}/include\n\nName: dmabuf_rdma\n\
             Description: The C library libdmabuf_rdma\nVersion: {version}\nLibs: -L${{libdir}} -ldmabuf_rdma\n\
             Libs.private: {private}\nCflags: -I${{includedir}}\n",
            home.display()
        );
        fs::write(lib.join("pkgconfig/dmabuf_rdma.pc"), description)?;
        Ok(Self { home })
    }

    fn lib(&self) -> PathBuf {
        self.home.join("lib")
    }

    /// Flags for a compiler, as pkg-config prints them.
    fn flags(&self, options: &[&str]) -> Result<Vec<String>> {
        let mut command = Command::new("pkg-config");
        command.env("PKG_CONFIG_PATH", self.lib().join("pkgconfig")).args(options).arg("dmabuf_rdma");
        Ok(process::output(&mut command)?.split_whitespace().map(String::from).collect())
    }

    /// The library exports what `docs/api` lists, and is called what programs will look for.
    fn check_symbols(&self) -> Result<()> {
        let library = self.lib().join("libdmabuf_rdma.so");
        let listed = process::output(Command::new("nm").args(["-D", "--defined-only", "-j"]).arg(&library))?;
        let mut exported: Vec<&str> = listed.lines().collect();
        exported.sort();
        let expected = api::c::symbols()?;
        if exported != expected {
            bail!(
                "the library exports {exported:?}, and docs/api lists {expected:?}: `cargo xtask api --update`"
            );
        }
        let dynamic = process::output(Command::new("readelf").arg("-dW").arg(&library))?;
        if !dynamic.contains(&format!("soname: [libdmabuf_rdma.so.{}]", minor())) {
            bail!("the library has no soname with its version:\n{dynamic}");
        }
        Ok(())
    }

    /// The header alone, in C and C++ of several standards.
    fn check_header(&self) -> Result<()> {
        let header = self.home.join("include/dmabuf_rdma.h");
        for (compiler, language, standard) in
            [("gcc", "c", "c11"), ("g++", "c++", "c++11"), ("g++", "c++", "c++20")]
        {
            let mut command = Command::new(compiler);
            command.args([
                &format!("-std={standard}"),
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
                "-fsyntax-only",
            ]);
            shown(command.args(["-x", language]).arg(&header))?;
        }
        Ok(())
    }

    fn compile_all(&self) -> Result<()> {
        let dynamic = self.flags(&["--cflags", "--libs"])?;
        // The archive instead of the library beside it.
        let archive: Vec<String> = self.flags(&["--static", "--cflags", "--libs"])?;
        let archive: Vec<String> =
            archive.into_iter().map(|flag| flag.replace("-ldmabuf_rdma", "-l:libdmabuf_rdma.a")).collect();
        let programs = self.home.join("programs");
        for (folder, sources) in [("tests", TESTS), ("examples", EXAMPLES)] {
            for (name, libraries) in sources {
                let source = format!("capi/{folder}/{name}.c");
                self.compile(
                    "gcc",
                    &[STRICT, SANITIZED].concat(),
                    &source,
                    &programs.join(name),
                    &dynamic,
                    libraries,
                )?;
            }
        }
        // valgrind takes its time to read debug information.
        let (library, plain) = (self.lib().join("libdmabuf_rdma.so"), programs.join("plain"));
        let small = plain.join(format!("libdmabuf_rdma.so.{}", minor()));
        process::output(Command::new("strip").args(["-g", "-o"]).arg(&small).arg(&library))?;
        let beside = format!("-Wl,-rpath,{}", plain.display());
        let first = [STRICT, &[beside.as_str()]].concat();
        self.compile("gcc", &first, "capi/tests/refusals.c", &plain.join("refusals"), &dynamic, &[])?;
        let sanitized = [STRICT, SANITIZED].concat();
        let one = programs.join("transfers_static");
        self.compile("gcc", &sanitized, "capi/tests/transfers.c", &one, &archive, &[])?;
        let cpp = [&["-Wall", "-Wextra", "-Werror", "-g", "-O1"], SANITIZED].concat();
        self.compile("g++", &cpp, "capi/tests/from_cpp.cpp", &programs.join("from_cpp"), &dynamic, &[])?;
        let driver = self.home.join("stubs/libcuda.so.1");
        let options = ["-shared", "-fPIC", "-O1", "-Wno-unused-function", "-Wl,-soname,libcuda.so.1"];
        self.compile("gcc", &options, "tests/stubs/cuda.c", &driver, &[], &[])
    }

    fn compile(
        &self,
        compiler: &str,
        options: &[&str],
        source: &str,
        program: &Path,
        flags: &[String],
        libraries: &[&str],
    ) -> Result<()> {
        let mut command = Command::new(compiler);
        command.current_dir(project::root()).args(options).arg(source).arg("-o").arg(program);
        command.args(flags).args(libraries).arg(format!("-Wl,-rpath,{}", self.lib().display()));
        process::output(&mut command).map(drop)
    }
}

/// The version that the soname has.
fn minor() -> &'static str {
    let version = env!("CARGO_PKG_VERSION");
    version.rsplit_once('.').map_or(version, |(minor, _)| minor)
}

/// Builds, and returns what rustc says that a program needs which links the archive.
fn native_libraries(build: &mut Command) -> Result<String> {
    const NOTE: &str = "native-static-libs: ";
    let text = process::shown(build);
    let out = build.output().with_context(|| format!("cannot run `{text}`"))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    if !out.status.success() {
        bail!("`{text}` failed ({}):\n{said}", out.status);
    }
    let line = said.lines().find_map(|line| line.split_once(NOTE));
    Ok(line.with_context(|| format!("`{text}` named no libraries:\n{said}"))?.1.to_string())
}
