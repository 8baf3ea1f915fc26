//! The PCI device of memory, and the NICs near it.

use dma_sg::pci::Sysfs;
use dmabuf_rdma::exporter::{CaptureDevice, DmaHeap, DumbBuffers, Exporter, Gbm, Runtime, Udmabuf, Vulkan};

use super::each;
use crate::common::drm::card;
use crate::common::system::vivid;

/// A machine with three NICs: below the GPU's switch, below another port, and on another host bridge.
fn machine(gpu: &str) -> tempfolder::Folder {
    let folder = tempfolder::Folder::new("nics");
    let domain = gpu.split(':').next().unwrap();
    let bridge = format!("pci{domain}:00");
    let path = |parts: &[&str]| format!("devices/{bridge}/{}", parts.join("/"));
    let switch = [format!("{domain}:00:01.0"), format!("{domain}:01:00.0")];
    for (name, device) in [
        ("", path(&[&switch[0], &switch[1], &format!("{domain}:02:00.0"), gpu])),
        ("near", path(&[&switch[0], &switch[1], &format!("{domain}:02:01.0"), &format!("{domain}:04:00.0")])),
        ("far", path(&[&format!("{domain}:00:02.0"), &format!("{domain}:05:00.0")])),
        ("farthest", "devices/pci0009:00/0009:00:03.0/0009:02:00.0".into()),
    ] {
        folder.device(&device);
        if !name.is_empty() {
            folder.link(&format!("class/infiniband/{name}"), &device);
        }
    }
    folder
}

mod tempfolder {
    use std::fs;
    use std::path::PathBuf;

    /// A sysfs of folders and links, removed when dropped.
    pub struct Folder(pub PathBuf);

    impl Folder {
        pub fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("dmabuf-rdma-{name}-{}", std::process::id()));
            fs::create_dir_all(folder.join("bus/pci/devices")).unwrap();
            Self(folder)
        }

        /// A PCI device, and a port for each folder above it.
        pub fn device(&self, path: &str) {
            fs::create_dir_all(self.0.join(path)).unwrap();
            // What sysfs shows without root: no capabilities.
            for folder in self.0.join(path).ancestors().take_while(|folder| !folder.ends_with("devices")) {
                fs::write(folder.join("config"), [0; 64]).unwrap();
            }
            let name = path.rsplit('/').next().unwrap();
            let link = self.0.join("bus/pci/devices").join(name);
            std::os::unix::fs::symlink(self.0.join(path), link).unwrap();
        }

        pub fn link(&self, entry: &str, device: &str) {
            fs::create_dir_all(self.0.join(entry)).unwrap();
            std::os::unix::fs::symlink(self.0.join(device), self.0.join(entry).join("device")).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

#[test]
fn the_nics_near_a_pointer_come_first() {
    each(|gpu, _| {
        let memory = gpu.memory(1 << 20).unwrap();
        let info = gpu.find(memory.address() + 77).unwrap().unwrap();
        let machine = machine(&info.device.unwrap().to_string());
        let routes = info.nearest_nics(&Sysfs::at(&machine.0)).unwrap();
        let names: Vec<_> = routes.iter().map(|route| route.to.name().unwrap().to_string()).collect();
        assert_eq!(names, ["near", "far", "farthest"], "{}", Runtime::name(gpu));
        let nowhere = dmabuf_rdma::exporter::PointerInfo { device: None, ..info };
        assert!(nowhere.nearest_nics(&Sysfs::at(&machine.0)).unwrap().is_empty());
        // This guest has no such GPU.
        assert!(info.nearest_nics(&Sysfs::new()).is_err());
    });
}

#[test]
fn buffers_know_the_device_that_made_them() {
    let of_card = |name: &str| {
        let card = Sysfs::new().drm_card(name).unwrap();
        card.into_pci().ok().map(|device| device.address())
    };
    for (driver, on_pci) in [("virtio_gpu", true), ("bochs-drm", true), ("vgem", false)] {
        drop(card(driver));
        let cards = DumbBuffers::by_driver(driver).unwrap();
        let device = cards.pci_device();
        assert_eq!(device.is_some(), on_pci, "{driver}");
        let buffer = cards.allocate(4096).unwrap().dmabuf;
        assert_eq!(buffer.pci_device(), device);
        assert_eq!(buffer.try_clone().unwrap().pci_device(), device);
        // sysfs has the same device for one of the cards.
        let known = (0..16).any(|number| {
            std::path::Path::new(&format!("/sys/class/drm/card{number}")).exists()
                && of_card(&format!("card{number}")) == device
        });
        assert!(known, "{driver}: {device:?}");
        // A descriptor alone does not tell.
        let fd: std::os::fd::OwnedFd = buffer.into();
        assert_eq!(dmabuf_rdma::DmaBuf::from_fd(fd).unwrap().pci_device(), None);
    }
    let gbm = Gbm::by_driver("virtio_gpu").unwrap().allocate(4096).unwrap().dmabuf;
    assert_eq!(gbm.pci_device(), DumbBuffers::by_driver("virtio_gpu").unwrap().pci_device());
    drop(vivid());
    let mut camera = CaptureDevice::by_driver("vivid").unwrap();
    camera.start(2).unwrap();
    assert_eq!((camera.pci_device(), camera.buffers()[0].pci_device()), (None, None), "vivid is not on PCI");
    let memory = [
        DmaHeap::open("system").unwrap().allocate(4096).unwrap().dmabuf,
        Udmabuf::open().unwrap().allocate(4096).unwrap().dmabuf,
        Vulkan::load().unwrap().allocate(4096).unwrap().dmabuf,
    ];
    assert!(memory.iter().all(|buffer| buffer.pci_device().is_none()), "memory of the machine");
}
