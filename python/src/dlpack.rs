//! Tensors that a producer lends through DLPack: their address, shape and device.
//!
//! `unsafe` is here to read the structs behind a capsule, whose layout dlpack.h fixes. The capsule stays the producer's:
//! whoever holds it holds the tensor, and its destructor returns the tensor.

use std::ffi::c_void;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyDict};

use crate::error::{Failed, Result};

/// Device types of dlpack.h.
pub mod device {
    pub const CPU: i32 = 1;
    pub const CUDA: i32 = 2;
    pub const CUDA_HOST: i32 = 3;
    pub const ROCM: i32 = 10;
    pub const ROCM_HOST: i32 = 11;
    pub const CUDA_MANAGED: i32 = 13;
    pub const ONE_API: i32 = 14;

    /// The name of a device type, for a message.
    pub fn name(kind: i32) -> String {
        let known = match kind {
            4 => "OpenCL",
            7 => "Vulkan",
            8 => "Metal",
            9 => "VPI",
            CUDA_MANAGED => "CUDA managed memory",
            15 => "WebGPU",
            16 => "Hexagon",
            17 => "MAIA",
            18 => "Trainium",
            _ => return format!("DLPack's device type {kind}"),
        };
        known.into()
    }
}

/// `DLTensor`.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    /// `DLDataType`.
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    manager_ctx: *mut c_void,
    deleter: *mut c_void,
    flags: u64,
    tensor: Tensor,
}

const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 1 << 1;

/// What a producer lends.
pub struct Lent {
    pub address: u64,
    pub device: i32,
    pub item_size: u64,
    pub shape: Vec<u64>,
    /// In bytes; `None` for a C-contiguous tensor.
    pub strides: Option<Vec<i64>>,
    pub read_only: bool,
    /// Holding it holds the tensor.
    pub capsule: Py<PyAny>,
}

/// Borrows the tensor of an object with `__dlpack__`.
pub fn borrow(object: &Bound<'_, PyAny>) -> Result<Lent> {
    let py = object.py();
    let options = PyDict::new(py);
    options.set_item("max_version", (1, 0))?;
    options.set_item("copy", false)?;
    let capsule = match object.call_method("__dlpack__", (), Some(&options)) {
        // A producer of before DLPack 1.0.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => object.call_method0("__dlpack__")?,
        answer => answer?,
    };
    let capsule = capsule.cast_into::<PyCapsule>().map_err(|_| {
        Failed::wrong_type("__dlpack__ returned something else than a capsule: the producer is broken")
    })?;
    let (tensor, flags): (*const Tensor, u64) = if let Ok(pointer) =
        capsule.pointer_checked(Some(c"dltensor_versioned"))
    {
        let versioned = pointer.as_ptr().cast::<Versioned>().cast_const();
        // SAFETY: the name says what it points to. The first two members have this layout in every version.
        let (major, minor) = unsafe { ((*versioned).major, (*versioned).minor) };
        if major != 1 {
            return Err(Failed::unsupported(format!(
                "the producer lends tensors as DLPack {major}.{minor}, and this library reads version 1"
            )));
        }
        // SAFETY: as above, with the layout of version 1.
        unsafe { (&raw const (*versioned).tensor, (*versioned).flags) }
    } else {
        let pointer = capsule.pointer_checked(Some(c"dltensor")).map_err(|_| {
            Failed::wrong_type("__dlpack__ returned a capsule that is no tensor, or one that is used already")
        })?;
        (pointer.as_ptr().cast::<Tensor>().cast_const(), 0)
    };
    if flags & IS_COPIED != 0 {
        return Err(Failed::misuse(
            "the producer lends a copy of its tensor, whose bytes nobody else sees: make it contiguous in memory that it can lend",
        ));
    }
    // SAFETY: the producer filled the tensor in, and keeps it as long as the capsule lives.
    let Tensor { data, device_type, ndim, bits, lanes, shape, strides, byte_offset, .. } =
        unsafe { std::ptr::read(tensor) };
    let bits = u32::from(bits) * u32::from(lanes);
    if !bits.is_multiple_of(8) {
        return Err(Failed::unsupported(format!(
            "elements of {bits} bits may be packed, and DLPack does not tell: view the tensor as bytes"
        )));
    }
    let count = usize::try_from(ndim).unwrap_or(0);
    let item_size = u64::from(bits / 8);
    let (mut sizes, mut steps) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for index in 0..count {
        // SAFETY: both arrays have `ndim` elements, and strides may be null.
        let (size, stride) =
            unsafe { (*shape.add(index), if strides.is_null() { 0 } else { *strides.add(index) }) };
        sizes.push(u64::try_from(size).map_err(|_| Failed::misuse("a tensor with a negative size"))?);
        steps.push(stride.checked_mul(item_size as i64).ok_or_else(|| Failed::misuse("a stride overflows"))?);
    }
    Ok(Lent {
        address: (data.addr() as u64).wrapping_add(byte_offset),
        device: device_type,
        item_size,
        shape: sizes,
        strides: (!strides.is_null()).then_some(steps),
        read_only: flags & READ_ONLY != 0,
        capsule: capsule.into_any().unbind(),
    })
}
