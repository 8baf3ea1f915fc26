//! The fences of a dma-buf: pending work of devices on the buffer, and waiting for it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys_ext::dma_buf as sys;

use super::{CpuAccess, DmaBuf, Error, Result};

/// The longest time that one poll(2) waits.
const MAX_POLL: Duration = Duration::from_millis(i32::MAX as u64);

impl DmaBuf {
    /// Waits until the buffer's fences permit an access. [`CpuAccess::Read`] waits for every writer; the
    /// other two also wait for every reader.
    ///
    /// An RDMA device neither waits for fences nor adds one. Before you post a transfer, wait here for the
    /// device that produces the data. A timeout of zero checks without waiting.
    ///
    /// # Errors
    /// - [`Error::FenceTimeout`]: the fences did not signal within `timeout`.
    /// - [`Error::Fence`]: poll(2) failed.
    #[doc(alias = "poll")]
    pub fn wait(&self, access: CpuAccess, timeout: Duration) -> Result<()> {
        let events = match access {
            CpuAccess::Read => PollFlags::POLLIN,
            CpuAccess::Write | CpuAccess::ReadWrite => PollFlags::POLLOUT,
        };
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            // Rounded up, so that the last millisecond is not spent spinning.
            let poll_timeout = match left {
                Some(left) => {
                    PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
                }
                None => PollTimeout::NONE,
            };
            match poll(&mut [PollFd::new(self.as_fd(), events)], poll_timeout) {
                Ok(0) if left.is_some_and(|left| left <= MAX_POLL) => {
                    return Err(Error::FenceTimeout { timeout });
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => {
                    return Err(Error::Fence { operation: "wait for the fences of", source: error.into() });
                }
            }
        }
    }

    /// Exports the fences that an access must wait for as a sync_file (Linux 6.0 and later), for APIs that
    /// take one.
    ///
    /// # Errors
    /// [`Error::Fence`]: `ENOTTY` on older kernels.
    #[doc(alias = "DMA_BUF_IOCTL_EXPORT_SYNC_FILE")]
    pub fn export_fences(&self, access: CpuAccess) -> Result<OwnedFd> {
        sys::export_sync_file(self.as_fd(), access.sync_flags() as u32)
            .map_err(|source| Error::Fence { operation: "export the fences of", source })
    }

    /// Adds the fences of a sync_file to the buffer (Linux 6.0 and later): as a reader's for
    /// [`CpuAccess::Read`], otherwise as a writer's.
    ///
    /// # Errors
    /// [`Error::Fence`]: `EINVAL` if the descriptor is not a sync_file, `ENOTTY` on older kernels.
    #[doc(alias = "DMA_BUF_IOCTL_IMPORT_SYNC_FILE")]
    pub fn import_fence(&self, access: CpuAccess, sync_file: impl AsFd) -> Result<()> {
        sys::import_sync_file(self.as_fd(), access.sync_flags() as u32, sync_file.as_fd())
            .map_err(|source| Error::Fence { operation: "add a fence to", source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_timeout_is_taken() {
        // /dev/null is ready for everything.
        let buffer = DmaBuf::fake(1, 4096);
        for timeout in [Duration::ZERO, MAX_POLL, Duration::MAX] {
            for access in [CpuAccess::Read, CpuAccess::Write, CpuAccess::ReadWrite] {
                buffer.wait(access, timeout).unwrap();
            }
        }
    }
}
