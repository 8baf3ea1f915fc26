//! Chooses between KVM and software emulation (TCG) by a trial boot.
//!
//! `/dev/kvm` may exist and still not run a stock kernel, for example inside
//! another guest. The trial boots a kernel up to its first process.

use super::qemu::{Accel, Machine};
use super::relay::Event;
use crate::size::Size;
use crate::{project, ui};
use anyhow::{Context, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

/// Timeout of the trial. A working KVM needs a second; a broken one may hang.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(8);

/// The fastest accelerator that works on this machine.
pub fn choose(image: &Path, initramfs: &Path) -> Result<Accel> {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        if let Some(text) = hint(&error) {
            ui::note("Hint", text);
        }
        return Ok(Accel::Tcg);
    }
    // The result may change with the host's kernel, a reboot or another QEMU.
    let fact = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_string();
    let qemu = crate::process::find("qemu-system-x86_64").and_then(|p| p.metadata().ok()?.modified().ok());
    let key = format!(
        "{} {} {qemu:?}",
        fact("/proc/sys/kernel/osrelease"),
        fact("/proc/sys/kernel/random/boot_id")
    );
    let cache = project::target().join("vm/accel");
    let cached = fs::read_to_string(&cache).unwrap_or_default();
    match cached.split_once('\n') {
        Some((k, "kvm")) if k == key => return Ok(Accel::Kvm),
        Some((k, "tcg")) if k == key => return Ok(Accel::Tcg),
        _ => {}
    }
    let works = try_kvm(image, initramfs)?;
    if !works {
        ui::note("Guest", "/dev/kvm exists but does not boot a kernel; using software emulation (TCG)");
    }
    fs::write(&cache, format!("{key}\n{}", if works { "kvm" } else { "tcg" }))
        .with_context(|| format!("cannot write {}", cache.display()))?;
    Ok(if works { Accel::Kvm } else { Accel::Tcg })
}

/// What to do about /dev/kvm, which cannot be opened.
fn hint(error: &std::io::Error) -> Option<&'static str> {
    (error.kind() == ErrorKind::PermissionDenied).then_some(
        "/dev/kvm exists and you may not open it, so the guest is emulated; KVM is many times faster: \
         `sudo usermod -aG kvm $USER`, and log in again",
    )
}

fn try_kvm(image: &Path, initramfs: &Path) -> Result<bool> {
    let run = super::rundir::RunDir::new()?;
    let machine = Machine {
        accel: Accel::Kvm,
        cpus: 2,
        memory: Size::gib(1),
        image,
        initramfs,
        append: &["xtask.trial".to_string()],
        extra: &[],
        terminal: false,
    };
    let mut started = machine.start(&run)?;
    let end = Instant::now() + TRIAL_TIMEOUT;
    let mut works = false;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        match started.next_event(left) {
            Some(Event::Ready) => {
                works = true;
                break;
            }
            Some(Event::Gone) => break,
            _ => {}
        }
    }
    started.stop();
    Ok(works)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lack_of_permission_gives_a_hint() {
        let text = hint(&ErrorKind::PermissionDenied.into()).unwrap();
        assert!(text.contains("usermod -aG kvm"), "{text}");
        assert_eq!(hint(&ErrorKind::NotFound.into()), None);
    }
}
