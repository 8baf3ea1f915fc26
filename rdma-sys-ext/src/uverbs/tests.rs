//! Compares the bytes of each command and its answer, with the fake kernel of `ioctl::fake`.

use super::{Attr, Command, abi, mr};
use crate::ioctl::fake::{self, errno, null};
use std::cell::Cell;
use std::os::fd::AsFd;
use std::ptr;
use std::rc::Rc;

/// The little-endian bytes of an attribute: id, length, flags (mandatory), enum data, value.
fn bytes(attr: &Attr<'_>) -> [u8; 16] {
    // SAFETY: an attribute is 16 bytes without padding.
    unsafe { ptr::from_ref(attr).cast::<[u8; 16]>().read() }
}

#[test]
#[cfg(target_endian = "little")]
fn attributes_are_encoded_as_the_kernel_reads_them() {
    assert_eq!(
        bytes(&Attr::object(0x0102, 0x0a0b_0c0d)),
        [2, 1, 0, 0, 1, 0, 0, 0, 0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0]
    );
    assert_eq!(bytes(&Attr::u64(3, 0x0102_0304_0506_0708)), [3, 0, 8, 0, 1, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(
        bytes(&Attr::u32(5, -1i32 as u32)),
        [5, 0, 4, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
    );
    let mut answer = 0;
    let address = (&raw const answer).addr().to_le_bytes();
    let out = bytes(&Attr::out_u32(7, &mut answer));
    assert_eq!(out[..8], [7, 0, 4, 0, 1, 0, 0, 0]);
    assert_eq!(out[8..], address);
}

#[test]
fn a_command_is_a_header_and_its_attributes_without_gaps() {
    let command = Command::new(7, 4, [Attr::object(0, 0), Attr::u64(2, 9)]);
    assert_eq!(size_of_val(&command), 24 + 2 * 16);
    let header =
        abi::Header { length: 56, object_id: 7, method_id: 4, num_attrs: 2, ..abi::Header::default() };
    assert_eq!(command.header, header);
    assert_eq!(std::mem::offset_of!(Command<'_, 2>, attributes), 24);
}

const REQUEST: mr::RegDmabufMr =
    mr::RegDmabufMr { pd_handle: 3, fd: -1, offset: 0x1000, length: 0x2000, iova: 0x7000, access: 0xf };

#[test]
fn another_descriptor_is_enotty() {
    let null = null();
    // SAFETY: the request names no descriptor.
    let registered = unsafe { mr::reg_dmabuf_mr(null.as_fd(), &REQUEST) };
    assert_eq!(errno(registered), Some(libc::ENOTTY));
    // SAFETY: there are no memory regions on /dev/null.
    let destroyed = unsafe { mr::destroy(null.as_fd(), 1) };
    assert_eq!(errno(destroyed), Some(libc::ENOTTY));
}

/// A kernel with one device, of driver `driver`. It refuses another driver id with EINVAL, then an
/// unknown object type with EPROTONOSUPPORT. It counts all other commands in `accepted` and passes them
/// to `method`.
fn kernel(
    driver: u32,
    accepted: Rc<Cell<usize>>,
    mut method: impl FnMut(&abi::Header, &mut [abi::Attribute]) -> Result<i32, i32> + 'static,
) -> impl FnMut(libc::Ioctl, *mut u8) -> Result<i32, i32> + 'static {
    move |opcode, argument| {
        assert_eq!(opcode, abi::IOCTL);
        // SAFETY: every command starts with a header, and `num_attrs` attributes follow it.
        let (header, attributes) = unsafe {
            let header = argument.cast::<abi::Header>();
            let first = header.add(1).cast::<abi::Attribute>();
            let count = usize::from((*header).num_attrs);
            (*header, std::slice::from_raw_parts_mut(first, count))
        };
        assert_eq!(header.length, 24 + 16 * header.num_attrs);
        assert_eq!((header.reserved1, header.reserved2), (0, 0));
        if header.driver_id != driver {
            return Err(libc::EINVAL);
        }
        if header.object_id == abi::OBJECT_NONE {
            return Err(libc::EPROTONOSUPPORT);
        }
        accepted.set(accepted.get() + 1);
        method(&header, attributes)
    }
}

#[test]
fn registering_sends_the_request_and_reads_the_answer() {
    let accepted = Rc::new(Cell::new(0));
    let method = |header: &abi::Header, attributes: &mut [abi::Attribute]| {
        assert_eq!((header.object_id, header.method_id), (7, 4));
        let values: Vec<_> = attributes[..7].iter().map(|a| (a.attr_id, a.len, a.data)).collect();
        let expected = [
            (0, 0, 0),
            (1, 0, 3),
            (2, 8, 0x1000),
            (3, 8, 0x2000),
            (4, 8, 0x7000),
            (5, 4, u32::MAX.to_le().into()),
            (6, 4, 0xf),
        ];
        #[cfg(target_endian = "little")]
        assert_eq!(values, expected);
        attributes[0].data = 0x55;
        for (answer, key) in attributes[7..].iter().zip([0xaaaa, 0xbbbb]) {
            assert_eq!(answer.len, 4);
            let key_out = ptr::with_exposed_provenance_mut::<u32>(answer.data as usize);
            // SAFETY: the address is that of the caller's u32, exposed for this.
            unsafe { key_out.write(key) };
        }
        Ok(0)
    };
    // SAFETY: the request names no descriptor.
    let registered = fake::with(kernel(14, accepted.clone(), method), || unsafe {
        mr::reg_dmabuf_mr(null().as_fd(), &REQUEST)
    });
    let expected = mr::RegisteredMr { handle: 0x55, lkey: 0xaaaa, rkey: 0xbbbb };
    assert_eq!(registered.unwrap(), expected);
    assert_eq!(accepted.get(), 1);
}

#[test]
fn the_driver_id_is_found_and_a_real_einval_is_kept() {
    for driver in [1, 14, 22, 14] {
        let accepted = Rc::new(Cell::new(0));
        let mut answers = [Ok(0), Ok(0), Err(libc::EINVAL), Err(libc::ENOENT)].into_iter();
        let method = move |header: &abi::Header, attributes: &mut [abi::Attribute]| {
            assert_eq!((header.object_id, header.method_id), (7, 1));
            let handle = abi::Attribute { flags: 1, data: 0x55, ..abi::Attribute::default() };
            assert_eq!(attributes, [handle]);
            answers.next().unwrap()
        };
        fake::with(kernel(driver, accepted.clone(), method), || {
            // SAFETY: there are no memory regions in the fake kernel.
            let destroy = || unsafe { mr::destroy(null().as_fd(), 0x55) };
            destroy().unwrap();
            destroy().unwrap();
            assert_eq!(errno(destroy()), Some(libc::EINVAL));
            assert_eq!(errno(destroy()), Some(libc::ENOENT));
        });
        // A command that the kernel refused for another reason than the driver id is not sent twice.
        assert_eq!(accepted.get(), 4);
    }
}

#[test]
fn an_unknown_driver_id_keeps_the_first_error() {
    let accepted = Rc::new(Cell::new(0));
    let method = |_: &abi::Header, _: &mut [abi::Attribute]| Ok(0);
    // SAFETY: there are no memory regions in the fake kernel.
    let destroyed = fake::with(kernel(u32::MAX, accepted.clone(), method), || unsafe {
        mr::destroy(null().as_fd(), 0x55)
    });
    assert_eq!(errno(destroyed), Some(libc::EINVAL));
    assert_eq!(accepted.get(), 0);
}
