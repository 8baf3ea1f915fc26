//! The fences of a dma-buf: what devices still do with it, and waiting for them.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma_sys_ext::dma_buf as sys;

use super::{CpuAccess, DmaBuf};
use crate::{Error, Result};

impl DmaBuf {
    /// Waits until the buffer's fences allow an access: for [`CpuAccess::Read`] until every writer is
    /// done, otherwise until every reader is too.
    ///
    /// An RDMA device takes no part in fences: wait for the device that produces the data before a
    /// transfer is posted.
    ///
    /// # Errors
    /// - [`Error::FenceTimeout`]: not within `limit`; a limit of zero asks without waiting.
    /// - [`Error::Fence`]: poll(2) failed.
    pub fn wait(&self, access: CpuAccess, limit: Duration) -> Result<()> {
        let events = match access {
            CpuAccess::Read => PollFlags::POLLIN,
            CpuAccess::Write | CpuAccess::ReadWrite => PollFlags::POLLOUT,
        };
        let deadline = Instant::now().checked_add(limit);
        loop {
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            // Rounded up, so that a wait does not spin through its last millisecond.
            let timeout = match left {
                Some(left) => {
                    PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
                }
                None => PollTimeout::NONE,
            };
            match poll(&mut [PollFd::new(self.as_fd(), events)], timeout) {
                Ok(0) if left.is_some_and(|left| left <= MAX_POLL) => {
                    return Err(Error::FenceTimeout { limit });
                }
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => {
                    return Err(Error::Fence { operation: "wait for the fences", source: error.into() });
                }
            }
        }
    }

    /// The fences that an access must wait for, as a sync_file of their own (Linux 6.0 and later), for
    /// APIs that take one.
    ///
    /// # Errors
    /// [`Error::Fence`]: `ENOTTY` on older kernels.
    #[doc(alias = "DMA_BUF_IOCTL_EXPORT_SYNC_FILE")]
    pub fn export_fences(&self, access: CpuAccess) -> Result<OwnedFd> {
        sys::export_sync_file(self.as_fd(), access.sync_flags() as u32)
            .map_err(|source| Error::Fence { operation: "export the fences", source })
    }

    /// Adds a sync_file's fences to the buffer: as a writer's for [`CpuAccess::Write`] and
    /// [`CpuAccess::ReadWrite`], as a reader's otherwise (Linux 6.0 and later).
    ///
    /// # Errors
    /// [`Error::Fence`]: `EINVAL` for something that is no sync_file, `ENOTTY` on older kernels.
    #[doc(alias = "DMA_BUF_IOCTL_IMPORT_SYNC_FILE")]
    pub fn import_fence(&self, access: CpuAccess, sync_file: impl AsFd) -> Result<()> {
        sys::import_sync_file(self.as_fd(), access.sync_flags() as u32, sync_file.as_fd())
            .map_err(|source| Error::Fence { operation: "add a fence", source })
    }
}

/// Longest time that one poll(2) can wait for.
const MAX_POLL: Duration = Duration::from_millis(i32::MAX as u64);
