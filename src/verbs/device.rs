//! The RDMA devices of this machine.

use std::ffi::CStr;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as ffi;

use super::Context;
use super::absence::{self, Cause, System};
use super::error::{Error, Result};

/// An RDMA device of this machine, not yet open.
#[derive(Debug, Clone)]
pub struct Device {
    raw: NonNull<ffi::ibv_device>,
    name: String,
    // The entry is valid while its list lives.
    _list: Arc<List>,
}

// SAFETY: libibverbs writes an entry only while it builds the list, and locks the state behind it.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

#[derive(Debug)]
struct List(NonNull<*mut ffi::ibv_device>);

// SAFETY: the list is only read, and the last reference frees it once.
unsafe impl Send for List {}
// SAFETY: as above.
unsafe impl Sync for List {}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the pointer came from ibv_get_device_list and is freed only here. Every `Device` that
        // points into the list holds it.
        unsafe { ffi::ibv_free_device_list(self.0.as_ptr()) };
    }
}

/// Lists the RDMA devices of this machine, in the kernel's order. The list is empty if the kernel has none.
///
/// # Errors
/// [`Error::ListDevices`]. Its message names what is missing:
/// - `ENOSYS`: the kernel module ib_uverbs is not loaded.
/// - `ENOENT`, `EACCES`: the kernel has devices, but their nodes in /dev/infiniband are missing or forbidden.
/// - No errno: the kernel has devices, but no provider for them is installed.
/// - `EMFILE`, `ENFILE`: no descriptor is free. Also `EPERM`, `ENOMEM`.
#[doc(alias = "ibv_get_device_list")]
pub fn devices() -> Result<Vec<Device>> {
    let failed = |reason, source| Error::ListDevices { reason, source };
    absence::descriptors().map_err(|source| failed(absence::exhaustion(&source).into(), source))?;
    let mut count = 0;
    // SAFETY: the only argument points to a local variable for the count.
    let list = unsafe { ffi::ibv_get_device_list(&mut count) };
    let Some(list) = NonNull::new(list) else {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            Some(libc::ENOSYS) => failed(System::this().nothing_listed().text, source),
            _ => failed("libibverbs failed".into(), source),
        });
    };
    let owner = Arc::new(List(list));
    let entry = |at| {
        // SAFETY: the list has `count` entries, and the name is a NUL-terminated array in the entry.
        let (raw, name) = unsafe {
            let raw = *list.as_ptr().add(at);
            (raw, CStr::from_ptr(ffi::ibv_get_device_name(raw)))
        };
        let name = name.to_string_lossy().into_owned();
        NonNull::new(raw).map(|raw| Device { raw, name, _list: owner.clone() })
    };
    let devices: Vec<_> = (0..count as usize).filter_map(entry).collect();
    match System::this().unlisted().filter(|_| devices.is_empty()) {
        None => Ok(devices),
        Some(Cause { text, source }) => {
            Err(failed(text, source.unwrap_or_else(|| io::Error::other("libibverbs lists no device"))))
        }
    }
}

impl Device {
    /// Finds a device by name: `rxe0`, `mlx5_0`, …
    ///
    /// # Errors
    /// - [`Error::UnknownDevice`]: libibverbs lists no device of this name; the message has those that it lists, and
    ///   says why it leaves this one out if the kernel has it.
    /// - [`Error::ListDevices`]: as [`devices`], except that `ENOSYS` counts as an empty list.
    pub fn by_name(name: &str) -> Result<Self> {
        let unknown = |present, reason| Error::UnknownDevice { name: name.into(), present, reason };
        let mut all = match devices() {
            // Without RDMA support there are no devices: the same error helps.
            Err(Error::ListDevices { reason, source }) if source.raw_os_error() == Some(libc::ENOSYS) => {
                return Err(unknown(Vec::new(), reason));
            }
            answer => answer?,
        };
        if let Some(at) = all.iter().position(|device| device.name == name) {
            return Ok(all.swap_remove(at));
        }
        let system = System::this();
        let cause = if all.is_empty() { Some(system.nothing_listed()) } else { system.device(name) };
        let present = all.into_iter().map(|device| device.name).collect();
        Err(unknown(present, cause.map(|cause| cause.text).unwrap_or_default()))
    }

    /// The kernel's name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`]; the message says what is wrong with the node `/dev/infiniband/uverbs*`:
    /// - `EACCES`: its file permissions exclude this user. `EPERM`: the container's device cgroup excludes it.
    /// - `ENOENT`: the node is missing. `ENODEV`, `ENXIO`: the device was removed.
    /// - `EMFILE`, `ENFILE`: no descriptor is free. Otherwise another errno of the kernel or the provider.
    #[doc(alias = "ibv_open_device")]
    pub fn open(&self) -> Result<Context> {
        // SAFETY: the entry is valid while its list lives, which this device holds.
        let raw = unsafe { ffi::ibv_open_device(self.raw.as_ptr()) };
        let Some(raw) = NonNull::new(raw) else {
            // libibverbs looks for another node when it cannot open the usual one, and loses the first errno.
            let errno = io::Error::last_os_error();
            let (operation, source) = match System::this().node(&self.node()) {
                Some(Cause { text, source }) => (format!("open the device: {text}"), source.unwrap_or(errno)),
                None => ("open the device".into(), errno),
            };
            return Err(Error::Device { device: self.name.clone(), operation, source });
        };
        Ok(Context::opened(raw, self.name.as_str()))
    }

    /// The name of its node in /dev/infiniband.
    fn node(&self) -> String {
        // SAFETY: the entry is valid while its list lives, and the name is a NUL-terminated array in it.
        unsafe { CStr::from_ptr(&raw const (*self.raw.as_ptr()).dev_name as *const _) }
            .to_string_lossy()
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_is_refused_with_the_list() {
        match Device::by_name("no-such-device") {
            Err(Error::UnknownDevice { name, present, reason }) => {
                assert_eq!(name, "no-such-device");
                assert!(!present.contains(&name));
                assert!(!present.is_empty() || !reason.is_empty());
            }
            // A host that has devices and lacks their nodes or providers.
            Err(Error::ListDevices { reason, .. }) => assert!(!reason.is_empty()),
            other => panic!("expected UnknownDevice, got {other:?}"),
        }
    }
}
