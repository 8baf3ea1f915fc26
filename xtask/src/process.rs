//! Runs other programs. Errors contain the command and its output.

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The command as one would type it in a shell.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| quote(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// Quotes `word` so that a POSIX shell reads it as one word.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Runs a command and returns its stdout, or an error with all its output.
pub fn output(command: &mut Command) -> Result<String> {
    let text = shown(command);
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{text}`"))?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if !out.status.success() {
        let stderr = String::from_utf8_lossy(&out.stderr);
        bail!("`{text}` failed ({}):\n{}{}", out.status, tail(&stdout, 20), tail(&stderr, 40));
    }
    Ok(stdout)
}

/// Decompresses `data`. The file name's `suffix` names the compression.
pub fn decompressed(suffix: &str, data: Vec<u8>) -> Result<Vec<u8>> {
    let program = match suffix {
        "xz" => "xz",
        "zst" => "zstd",
        "gz" => "gzip",
        _ => bail!("cannot decompress .{suffix}; only xz, zst and gz are supported"),
    };
    let mut command = Command::new(program);
    command.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    let mut stdin = child.stdin.take().context("no input")?;
    // Write and read at the same time, or both sides block on full pipes.
    let feed = std::thread::spawn(move || stdin.write_all(&data));
    let out = child.wait_with_output()?;
    let fed = feed.join().is_ok_and(|written| written.is_ok());
    if !out.status.success() || !fed {
        bail!("{program} failed to decompress its input ({})", out.status);
    }
    Ok(out.stdout)
}

/// The last `count` lines of a text.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut tail = lines[lines.len().saturating_sub(count)..].join("\n");
    if !tail.is_empty() {
        tail.push('\n');
    }
    tail
}

/// Finds a program in PATH or in the system's bin and sbin folders.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_survives_a_shell() {
        for word in ["plain", "two words", "it's", "", "$HOME `x` \\", "a\nb", "*"] {
            let script = format!("printf %s {}", quote(word));
            let out = output(Command::new("sh").args(["-c", &script])).unwrap();
            assert_eq!(out, word);
        }
    }

    #[test]
    fn an_error_has_the_command_and_its_output() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit 3") && error.contains("why"), "{error}");
    }
}
