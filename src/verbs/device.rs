//! The RDMA devices of this machine.

use std::ffi::CStr;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as ffi;

use super::Context;
use crate::{Error, Result};

/// An RDMA device that is present: a name to open.
#[derive(Debug, Clone)]
pub struct Device {
    raw: NonNull<ffi::ibv_device>,
    name: String,
    // The entry is valid while its list is.
    _list: Arc<List>,
}

// SAFETY: a device entry is not written after the list was made, and libibverbs locks what it keeps
// behind it.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

#[derive(Debug)]
struct List(NonNull<*mut ffi::ibv_device>);

// SAFETY: the list is only read, and freed once, by whoever holds the last reference.
unsafe impl Send for List {}
// SAFETY: as above.
unsafe impl Sync for List {}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: the pointer is that of ibv_get_device_list, freed here only; every `Device` that
        // points into it holds this list.
        unsafe { ffi::ibv_free_device_list(self.0.as_ptr()) };
    }
}

/// The RDMA devices that are present, in the kernel's order.
///
/// # Errors
/// [`Error::ListDevices`]: `ENOSYS` when the kernel has no RDMA subsystem loaded.
#[doc(alias = "ibv_get_device_list")]
pub fn devices() -> Result<Vec<Device>> {
    let mut count = 0;
    // SAFETY: the only argument is a valid place for the count.
    let list = unsafe { ffi::ibv_get_device_list(&mut count) };
    let Some(list) = NonNull::new(list) else {
        return Err(Error::ListDevices { source: io::Error::last_os_error() });
    };
    let owner = Arc::new(List(list));
    let entry = |at| {
        // SAFETY: the list has `count` entries, and a name is a NUL-terminated array in the entry.
        let (raw, name) = unsafe {
            let raw = *list.as_ptr().add(at);
            (raw, CStr::from_ptr(ffi::ibv_get_device_name(raw)))
        };
        let name = name.to_string_lossy().into_owned();
        NonNull::new(raw).map(|raw| Device { raw, name, _list: owner.clone() })
    };
    Ok((0..count as usize).filter_map(entry).collect())
}

impl Device {
    /// The device of that name: `rxe0`, `mlx5_0`, …
    ///
    /// # Errors
    /// - [`Error::UnknownDevice`]: there is none; the message lists those present.
    /// - [`Error::ListDevices`].
    pub fn by_name(name: &str) -> Result<Self> {
        let mut all = match devices() {
            Ok(all) => all,
            // No subsystem is no device: the same answer helps.
            Err(Error::ListDevices { source }) if source.raw_os_error() == Some(libc::ENOSYS) => Vec::new(),
            Err(error) => return Err(error),
        };
        match all.iter().position(|device| device.name == name) {
            Some(at) => Ok(all.swap_remove(at)),
            None => {
                let present = all.into_iter().map(|device| device.name).collect();
                Err(Error::UnknownDevice { name: name.into(), present })
            }
        }
    }

    /// The kernel's name of the device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Verbs`]: `EACCES` when `/dev/infiniband/uverbs*` is not for this user.
    #[doc(alias = "ibv_open_device")]
    pub fn open(&self) -> Result<Context> {
        // SAFETY: the entry is valid while the list that this device holds is.
        let raw = unsafe { ffi::ibv_open_device(self.raw.as_ptr()) };
        match NonNull::new(raw) {
            Some(raw) => Ok(Context::opened(raw, self.name.as_str())),
            None => Err(Error::Verbs {
                device: self.name.clone(),
                operation: "open the device".into(),
                source: io::Error::last_os_error(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_is_refused_with_the_list() {
        match Device::by_name("no-such-device") {
            Err(Error::UnknownDevice { name, present }) => {
                assert_eq!(name, "no-such-device");
                assert!(!present.contains(&name));
            }
            other => panic!("expected UnknownDevice, got {other:?}"),
        }
    }
}
