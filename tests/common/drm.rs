//! The guest's three virtual cards, and fences of vgem.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use dmabuf_rdma::DmaBuf;
use dmabuf_rdma::exporter::DumbBuffers;
use drm::control::Device as _;

use super::system::modprobe;

/// Loads the driver's module and opens its card. `vgem` and `virtio_gpu` have struct pages, `bochs-drm` has
/// none on 6.12.
#[track_caller]
pub fn card(driver: &str) -> DumbBuffers {
    modprobe(match driver {
        "virtio_gpu" => "virtio-gpu",
        "bochs-drm" => "bochs",
        other => other,
    });
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        match DumbBuffers::by_driver(driver) {
            // The node appears shortly after modprobe returns.
            Err(_) if std::time::Instant::now() < end => {
                std::thread::sleep(std::time::Duration::from_millis(50))
            }
            answer => return answer.unwrap_or_else(|e| panic!("{driver}: {e}")),
        }
    }
}

struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl drm::Device for Card {}
impl drm::control::Device for Card {}

/// A fence of vgem on a buffer: not signaled until [`signal`](Fence::signal).
pub struct Fence {
    card: Card,
    fence: u32,
}

/// `struct drm_vgem_fence_attach` of drm/vgem_drm.h.
#[repr(C)]
struct FenceAttach {
    handle: u32,
    flags: u32,
    out_fence: u32,
    pad: u32,
}

impl Fence {
    /// Adds a fence of a writer, or of a reader if `write` is false.
    #[track_caller]
    pub fn attach(buffer: &DmaBuf, write: bool) -> Self {
        card("vgem");
        let node = (0..64).map(|minor| format!("/dev/dri/card{minor}")).find_map(|path| {
            let card = Card(File::options().read(true).write(true).open(path).ok()?);
            let name = drm::Device::get_driver(&card).ok()?;
            (name.name() == "vgem").then_some(card)
        });
        let card = node.expect("vgem's card");
        let handle = card.prime_fd_to_buffer(buffer.as_fd()).expect("import into vgem");
        let mut attach = FenceAttach { handle: handle.into(), flags: write.into(), out_fence: 0, pad: 0 };
        const ATTACH: libc::c_ulong = 0xc010_6441; // DRM_IOWR(DRM_COMMAND_BASE + 1, 16 bytes)
        // SAFETY: the argument is the struct that the opcode was computed from.
        let code = unsafe { libc::ioctl(card.0.as_raw_fd(), ATTACH, &raw mut attach) };
        assert_eq!(code, 0, "VGEM_FENCE_ATTACH: {}", std::io::Error::last_os_error());
        Self { card, fence: attach.out_fence }
    }

    #[track_caller]
    pub fn signal(self) {
        const SIGNAL: libc::c_ulong = 0x4008_6442; // DRM_IOW(DRM_COMMAND_BASE + 2, 8 bytes)
        let argument = [self.fence, 0];
        // SAFETY: the argument is a `struct drm_vgem_fence_signal`: the fence and flags of 0.
        let code = unsafe { libc::ioctl(self.card.0.as_raw_fd(), SIGNAL, &raw const argument) };
        assert_eq!(code, 0, "VGEM_FENCE_SIGNAL: {}", std::io::Error::last_os_error());
    }
}
