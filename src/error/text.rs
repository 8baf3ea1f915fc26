//! The words of the messages that depend on their values.

use std::io;

use crate::mr::Refusal;
use crate::umem::Iova;

/// The kernel's internal ENOTSUPP, which some drivers leak to user space. libc has no name for it.
pub(crate) const ENOTSUPP: i32 = 524;

/// What an errno of a registration usually means, where that is not what its text says.
pub(super) fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(ENOTSUPP) => {
            " (errno 524 is the kernel's internal ENOTSUPP: the exporter's driver refuses peer-to-peer mapping for this device)"
        }
        Some(libc::ENOMEM) => {
            " (no memory for the page list, the device is out of regions, or RLIMIT_MEMLOCK in a user namespace)"
        }
        Some(libc::EINVAL) => {
            " (a limit of the device: compare length and page size with max_mr_size and page_size_cap)"
        }
        Some(libc::EIO | libc::ENODEV) => " (the device is going away, or was reset)",
        _ => "",
    }
}

/// Why a region cannot be deregistered.
pub(super) fn deregister_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EINVAL) => ": something still uses it (a memory window, for one)",
        _ => "",
    }
}

/// Why a buffer cannot be mapped for a device.
pub(super) fn view_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENXIO) => ": no driver has set the device up for DMA, so bind one",
        Some(libc::EBUSY) => {
            ": its driver (vfio-pci, pci-stub, a bridge's) has taken its DMA out of the kernel's hands"
        }
        Some(libc::EADDRNOTAVAIL) => {
            ": its mappings would be bounced (swiotlb=force, or a DMA mask too small for this memory)"
        }
        Some(libc::ENOSYS) => ": the exporter has no pages to list",
        Some(libc::EOPNOTSUPP | ENOTSUPP) => ": the exporter does not map its memory for this device",
        _ => "",
    }
}

pub(super) fn post_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOMEM) => ": the queue is full, so poll completions first",
        Some(libc::EINVAL) => {
            ": a length, count or state that the queue pair does not take; is it connected?"
        }
        _ => "",
    }
}

pub(super) fn list(refusals: &[Refusal]) -> String {
    refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

pub(super) fn listed(names: &[String]) -> String {
    match names {
        [] => "there is none on this machine (for soft-RoCE: rdma link add rxe0 type rxe netdev eth0)".into(),
        names => format!("present: {}", names.join(", ")),
    }
}

pub(super) fn nearest_congruent(iova: u64, offset: u64, page_size: u64) -> Iova {
    let base = iova - iova % page_size;
    Iova(base.saturating_add(offset % page_size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use std::error::Error as _;

    #[test]
    fn the_message_never_repeats_its_source_and_the_errno_is_kept() {
        let error = Error::Deregister { lkey: 0x1234, source: io::Error::from_raw_os_error(libc::EBUSY) };
        let source = error.source().expect("a source").to_string();
        assert!(!error.to_string().contains(&source), "{error} repeats {source}");
        assert_eq!(error.errno(), Some(libc::EBUSY));
        assert_eq!(Error::ForeignBacking.errno(), None);
    }

    #[test]
    fn an_uncongruent_iova_is_told_the_nearest_one() {
        let error = Error::IovaNotCongruent { iova: Iova(0x1_0000_0000), offset: 0x12, page_size: 4096 };
        assert!(error.to_string().contains("in that page, 0x100000012 fits"), "{error}");
    }

    #[test]
    fn an_unknown_device_lists_those_present() {
        let named = |present: &[&str]| {
            let present = present.iter().map(ToString::to_string).collect();
            Error::UnknownDevice { name: "mlx5_9".into(), present }.to_string()
        };
        assert!(named(&["rxe0", "mlx5_0"]).ends_with("present: rxe0, mlx5_0"));
        assert!(named(&[]).contains("rdma link add"));
    }

    /// Every variant has its place in docs/errors.md or docs/errors-memory.md, so that a reader can look it up.
    #[test]
    fn the_error_guide_has_every_variant() {
        let guide =
            concat!(include_str!("../../docs/errors.md"), include_str!("../../docs/errors-memory.md"));
        let sources = [
            include_str!("../error.rs"),
            include_str!("address.rs"),
            include_str!("vfio.rs"),
            include_str!("transfer.rs"),
            include_str!("connect.rs"),
            include_str!("registration.rs"),
            include_str!("exporter.rs"),
        ];
        let variants = sources.iter().flat_map(|source| source.lines()).filter_map(|line| {
            let name = line.strip_prefix("    ")?.trim_end_matches([' ', '{', ',']);
            let named = name.chars().next()?.is_ascii_uppercase() && name.chars().all(char::is_alphanumeric);
            named.then_some(name)
        });
        let missing: Vec<_> = variants.filter(|name| !guide.contains(&format!("`{name}`"))).collect();
        assert!(missing.is_empty(), "docs/errors*.md lack {missing:?}");
    }
}
