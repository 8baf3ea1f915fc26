//! The ioctl layer of `device_view` against the header of the kernel module. Not part of the published crate.

use std::fs::File;
use std::io::Write;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

#[path = "../src/device_view/sys.rs"]
mod sys;

/// Fields as `C expression, value in Rust`.
macro_rules! fields {
    ($c:literal = $type:path { $($field:ident),* }) => {{
        // All fields are named.
        let _ = |value: $type| { let $type { $($field: _),* } = value; };
        let fields = [$((concat!("offsetof(struct ", $c, ", ", stringify!($field), ")"), offset_of!($type, $field))),*];
        [(concat!("sizeof(struct ", $c, ")"), size_of::<$type>())].into_iter().chain(fields)
    }};
}

#[test]
fn layouts_and_opcodes_are_those_of_the_header() {
    let values = [
        ("DMA_SG_DEVICE_NONE", sys::DEVICE_NONE as usize),
        ("DMA_SG_DEVICE_PCI", sys::DEVICE_PCI as usize),
        ("DMA_SG_DEVICE_RDMA", sys::DEVICE_RDMA as usize),
        ("DMA_SG_NAME_LEN", sys::NAME_LEN),
        ("DMA_SG_IOCTL_MAP", sys::IOCTL_MAP as usize),
        ("DMA_SG_IOCTL_READ", sys::IOCTL_READ as usize),
    ];
    let facts = values
        .into_iter()
        .chain(fields!("dma_sg_map" = sys::Map { fd, device, flags, reserved, name }))
        .chain(fields!("dma_sg_entry" = sys::Entry { addr, len }))
        .chain(fields!("dma_sg_read" = sys::Read { first, count, total, entries }));
    let mut source = String::from("#include <stddef.h>\n#include \"dma_sg.h\"\n");
    for (theirs, ours) in facts {
        source += &format!("_Static_assert({theirs} == {ours}u, \"{theirs} is not {ours}\");\n");
    }
    let kernel = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernel/dma_sg");
    let mut compiler = Command::new("cc");
    compiler.args(["-fsyntax-only", "-I", kernel, "-x", "c", "-"]).stdin(Stdio::piped());
    let mut compiler = compiler.spawn().expect("cc starts");
    compiler.stdin.take().expect("piped").write_all(source.as_bytes()).expect("cc reads");
    assert!(compiler.wait().expect("cc ends").success(), "see above");
}

#[test]
fn another_device_and_a_long_name_are_refused() {
    let null = File::open("/dev/null").unwrap();
    let errno =
        |name| sys::map(null.as_fd(), null.as_fd(), sys::DEVICE_RDMA, name).unwrap_err().raw_os_error();
    assert_eq!(errno(c"rxe0"), Some(libc::ENOTTY));
    assert_eq!(
        errno(c"0123456789012345678901234567890123456789012345678901234567890123"),
        Some(libc::EINVAL)
    );
    let read = sys::read(null.as_fd(), 0, &mut [sys::Entry::default()]);
    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
}
