//! The compiler for modules: the one that built the kernel, which its headers name.

use super::read;
use crate::{host, process, ui};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::{Command, Stdio};

/// A compiler, and what make needs to hear if it is another one than the kernel's.
#[derive(Debug, PartialEq, Eq)]
pub struct Compiler {
    pub command: String,
    pub make_arguments: Vec<String>,
}

/// The compiler for a kernel's headers. As root, installs it if this machine's apt has it.
pub fn choose(headers: &Path) -> Result<Compiler> {
    let configuration = read(&headers.join("include/config/auto.conf"))?;
    let built =
        built_by(&configuration).context("the kernel's headers name no compiler (CONFIG_CC_VERSION_TEXT)")?;
    let major = major(built).with_context(|| format!("the kernel was built by \"{built}\", not by gcc"))?;
    let named = format!("gcc-{major}");
    if process::find(&named).is_some() || !is(major, "gcc") && host::offer(&named)? {
        return Ok(Compiler { command: named, make_arguments: Vec::new() });
    }
    if process::find("gcc").is_none() {
        bail!("\"{built}\" built the kernel, and this machine has no gcc; install {named} or gcc");
    }
    if is(major, "gcc") {
        return Ok(Compiler { command: "gcc".into(), make_arguments: Vec::new() });
    }
    ui::note("Note", &format!("{named} built the kernel; this machine's gcc builds the modules"));
    let refused: Vec<String> = OPTIONS
        .iter()
        .filter(|(config, flag)| configuration.contains(&format!("{config}=y")) && !takes("gcc", flag))
        .map(|(config, _)| format!("{config}="))
        .collect();
    Ok(Compiler { command: "gcc".into(), make_arguments: refused })
}

/// Configuration for compilers with an option, and the option.
const OPTIONS: &[(&str, &str)] = &[("CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT", "-fmin-function-alignment=16")];

/// `CONFIG_CC_VERSION_TEXT`, with or without quotes.
fn built_by(configuration: &str) -> Option<&str> {
    let line = configuration.lines().find_map(|line| line.strip_prefix("CONFIG_CC_VERSION_TEXT="));
    line.map(|text| text.trim_matches('"'))
}

/// The major version in such as `x86_64-linux-gnu-gcc-12 (Debian 12.2.0-14) 12.2.0`.
fn major(built: &str) -> Option<&str> {
    let (name, rest) = built.split_once(" (")?;
    let version = rest.split_once(") ")?.1;
    let major = version.split('.').next()?;
    (name.contains("gcc") && !major.is_empty() && major.bytes().all(|b| b.is_ascii_digit())).then_some(major)
}

fn is(major: &str, compiler: &str) -> bool {
    let version = process::output(Command::new(compiler).arg("-dumpversion"));
    version.is_ok_and(|text| text.trim().split('.').next() == Some(major))
}

fn takes(compiler: &str, flag: &str) -> bool {
    let mut command = Command::new(compiler);
    command.args([flag, "-E", "-x", "c", "/dev/null"]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock;

    #[test]
    fn the_headers_name_the_compiler() {
        for (line, expected) in [
            ("CONFIG_CC_VERSION_TEXT=\"gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0\"", Some("12")),
            ("CONFIG_CC_VERSION_TEXT=x86_64-linux-gnu-gcc-14 (Debian 14.2.0-19) 14.2.0", Some("14")),
            ("CONFIG_CC_VERSION_TEXT=\"gcc (GCC) 15.2.1 20250808 (Red Hat 15.2.1-1)\"", Some("15")),
            ("CONFIG_CC_VERSION_TEXT=\"Debian clang version 19.1.7 (3)\"", None),
        ] {
            assert_eq!(built_by(&format!("CONFIG_A=y\n{line}\n")).and_then(major), expected, "{line}");
        }
        assert_eq!(built_by("CONFIG_A=y\n"), None);
    }

    #[test]
    fn another_compiler_leaves_out_what_it_does_not_know() {
        let headers =
            lock::new_folder(&std::env::temp_dir(), |unique| format!("xtask-gcc-{unique}")).unwrap();
        let write = |text: &str| {
            std::fs::create_dir_all(headers.join("include/config")).unwrap();
            std::fs::write(headers.join("include/config/auto.conf"), text).unwrap();
        };
        let own = process::output(Command::new("gcc").arg("-dumpversion")).unwrap();
        let own = own.trim().split('.').next().unwrap();
        write(&format!("CONFIG_CC_VERSION_TEXT=\"gcc (GCC) {own}.9.9\"\n"));
        let compiler = choose(&headers).unwrap();
        assert!([format!("gcc-{own}"), "gcc".into()].contains(&compiler.command), "{compiler:?}");
        assert!(compiler.make_arguments.is_empty());

        write("CONFIG_CC_VERSION_TEXT=\"gcc-99 (X) 99.1.0\"\nCONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=y\n");
        let compiler = choose(&headers).unwrap();
        assert_eq!(compiler.command, "gcc");
        let knows = takes("gcc", OPTIONS[0].1);
        let left_out: &[&str] = if knows { &[] } else { &["CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT="] };
        assert_eq!(compiler.make_arguments, left_out);
        write("CONFIG_CC_VERSION_TEXT=\"clang version 19 (x) 19.1\"\n");
        assert!(choose(&headers).unwrap_err().to_string().contains("not by gcc"));
        std::fs::remove_dir_all(headers).unwrap();
    }
}
