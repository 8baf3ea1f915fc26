//! The memory under an object of Python, by the protocols that arrays and tensors have.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMemoryView};

use crate::access::name;
use crate::dlpack::{self, device};
use crate::error::{Failed, Result};

/// Memory of an array or tensor.
pub struct Source {
    /// Of the element with index 0.
    pub address: u64,
    pub item_size: u64,
    pub shape: Vec<u64>,
    /// In bytes; `None` for a C-contiguous array.
    pub strides: Option<Vec<i64>>,
    pub read_only: bool,
    /// Whether a GPU runtime allocated it.
    pub on_device: bool,
    /// What keeps the memory alive.
    pub keeper: Py<PyAny>,
    /// The object in words, for messages.
    pub what: String,
}

impl Source {
    /// Finds the memory of an object.
    pub fn of(object: &Bound<'_, PyAny>) -> Result<Self> {
        let what = format!("the {}", name(object));
        // Some producers have the attribute and raise for tensors that they cannot lend; DLPack may say more.
        if let Ok(interface) = object.getattr("__cuda_array_interface__")
            && let Ok(interface) = interface.cast::<PyDict>()
        {
            let mut source = Self::of_interface(object, interface, true, what)?;
            // A tensor may be given other memory while somebody holds it. What DLPack lends is the memory itself.
            if object.hasattr("__dlpack__")?
                && let Ok(lent) = dlpack::borrow(object)
                && lent.address == source.address
            {
                source.keeper = (source.keeper, lent.capsule).into_pyobject(object.py())?.into_any().unbind();
            }
            return Ok(source);
        }
        if let Ok(interface) = object.getattr("__array_interface__")
            && let Ok(interface) = interface.cast::<PyDict>()
            && interface.contains("data")?
        {
            return Self::of_interface(object, interface, false, what);
        }
        if object.hasattr("__dlpack__")? {
            return Self::of_dlpack(object, what);
        }
        Self::of_buffer(object, what)
    }

    fn of_interface(
        object: &Bound<'_, PyAny>,
        interface: &Bound<'_, PyDict>,
        on_device: bool,
        what: String,
    ) -> Result<Self> {
        let item = |key: &str| -> Result<Bound<'_, PyAny>> {
            let missing = || Failed::wrong_type(format!("the array interface of {what} has no {key:?}"));
            interface.get_item(key)?.filter(|value| !value.is_none()).ok_or_else(missing)
        };
        let (address, read_only): (u64, bool) = item("data")?.extract().map_err(|_| {
            Failed::wrong_type(format!("the data of the array interface of {what} is no address with a flag"))
        })?;
        let typestr: String = item("typestr")?.extract()?;
        let item_size = item_size(&typestr, &what)?;
        let shape: Vec<u64> = item("shape")?.extract()?;
        let strides = interface.get_item("strides")?.filter(|value| !value.is_none());
        let strides: Option<Vec<i64>> = strides.map(|strides| strides.extract()).transpose()?;
        let mask = interface.get_item("mask")?.filter(|value| !value.is_none());
        if mask.is_some() {
            return Err(Failed::misuse(format!("{what} has a mask, which would not be transferred")));
        }
        // Also the interface, which may hold the memory: a scalar of numpy lends a temporary copy.
        let keeper = (object, interface).into_pyobject(object.py())?.into_any().unbind();
        Ok(Self { address, item_size, shape, strides, read_only, on_device, keeper, what })
    }

    fn of_dlpack(object: &Bound<'_, PyAny>, what: String) -> Result<Self> {
        let lent = dlpack::borrow(object)?;
        let on_device = match lent.device {
            device::CPU | device::CUDA_HOST | device::ROCM_HOST => false,
            device::CUDA | device::ROCM | device::ONE_API => true,
            device::CUDA_MANAGED => {
                return Err(Failed::unsupported(format!(
                    "{what} is in CUDA managed memory, which moves between host and device: copy it to device memory"
                )));
            }
            other => {
                return Err(Failed::unsupported(format!(
                    "{what} is in memory of {}, which no dma-buf is made of: use the CPU, CUDA, ROCm or oneAPI",
                    device::name(other)
                )));
            }
        };
        let dlpack::Lent { address, item_size, shape, strides, read_only, capsule, .. } = lent;
        // Also the object: some producers' tensors are views that the capsule does not hold.
        let keeper = (capsule, object.clone()).into_pyobject(object.py())?.into_any().unbind();
        Ok(Self { address, item_size, shape, strides, read_only, on_device, keeper, what })
    }

    fn of_buffer(object: &Bound<'_, PyAny>, what: String) -> Result<Self> {
        // The view holds the buffer, so that a bytearray cannot be resized.
        let view = PyMemoryView::from(object).map_err(|_| {
            Failed::wrong_type(format!(
                "{what} is no memory: register takes an object with __dlpack__, __cuda_array_interface__, \
                 __array_interface__ or the buffer protocol, a DmaBuf, a HostBuffer, or (pointer, length) with unsafe=True"
            ))
        })?;
        let buffer = PyUntypedBuffer::get(&view)?;
        if buffer.format().to_bytes().contains(&b'O') {
            return Err(objects(&what));
        }
        if buffer.suboffsets().is_some() {
            return Err(Failed::misuse(format!(
                "{what} is an array of pointers to rows: copy it to one piece"
            )));
        }
        let shape = buffer.shape().iter().map(|&size| size as u64).collect();
        let strides = buffer.strides().iter().map(|&stride| stride as i64).collect();
        Ok(Self {
            address: buffer.buf_ptr().addr() as u64,
            item_size: buffer.item_size() as u64,
            shape,
            strides: Some(strides),
            read_only: buffer.readonly(),
            on_device: false,
            keeper: view.into_any().unbind(),
            what,
        })
    }

    /// Address and length of memory without gaps, in any order of its dimensions.
    pub fn whole(&self) -> Result<(u64, u64)> {
        let Some(total) = self.total()? else {
            return Err(Failed::misuse(format!(
                "{} has the shape {:?} and no bytes to register",
                self.what, self.shape
            )));
        };
        // Each element is at a place of its own, and they leave no gap.
        let mut dimensions: Vec<_> = self.dimensions().filter(|(size, _)| *size > 1).collect();
        dimensions.sort_by_key(|(_, stride)| stride.unsigned_abs());
        let mut next = self.item_size;
        let dense = dimensions.into_iter().all(|(size, stride)| {
            let fits = stride.unsigned_abs() == next;
            next = next.saturating_mul(size);
            fits
        });
        if !dense {
            return Err(Failed::misuse(format!(
                "{} is not contiguous: it has the shape {:?} and the strides {:?} in bytes. Register the array that it is \
                 a view of, and transfer Region.blocks_of(view), or make a contiguous copy",
                self.what,
                self.shape,
                self.strides.as_deref().unwrap_or_default(),
            )));
        }
        Ok((self.extent()?.0, total))
    }

    /// Total length of the elements in bytes; `None` if there are none.
    fn total(&self) -> Result<Option<u64>> {
        let total = self.shape.iter().try_fold(self.item_size, |total, &size| total.checked_mul(size));
        let total = total.ok_or_else(|| Failed::misuse(format!("the size of {} overflows", self.what)))?;
        Ok((total > 0).then_some(total))
    }

    /// The lowest address, and the bytes from there to the end of the highest element.
    fn extent(&self) -> Result<(u64, u64)> {
        let overflow = || Failed::misuse(format!("the addresses of {} overflow", self.what));
        let (mut below, mut above) = (0_i64, 0_i64);
        for (size, stride) in self.dimensions() {
            let reach = i64::try_from(size - 1)
                .ok()
                .and_then(|last| last.checked_mul(stride))
                .ok_or_else(overflow)?;
            let end = if reach < 0 { &mut below } else { &mut above };
            *end = end.checked_add(reach).ok_or_else(overflow)?;
        }
        let lowest = self.address.checked_add_signed(below).ok_or_else(overflow)?;
        let extent = above.checked_sub(below).and_then(|extent| extent.checked_add_unsigned(self.item_size));
        Ok((lowest, extent.ok_or_else(overflow)? as u64))
    }

    /// Size and stride in bytes of each dimension. No size is 0.
    fn dimensions(&self) -> impl Iterator<Item = (u64, i64)> {
        let mut contiguous: Vec<i64> = Vec::new();
        if self.strides.is_none() {
            let mut stride = self.item_size as i64;
            for &size in self.shape.iter().rev() {
                contiguous.push(stride);
                stride = stride.saturating_mul(size as i64);
            }
            contiguous.reverse();
        }
        let strides = self.strides.clone().unwrap_or(contiguous);
        self.shape.clone().into_iter().zip(strides)
    }

    /// The view as blocks in the memory that begins at `base`: their common length, and the offset of each, in C order.
    pub fn blocks(&self, base: u64, length: u64) -> Result<(u64, Vec<u64>)> {
        if self.total()?.is_none() {
            return Err(Failed::misuse(format!("{} has the shape {:?} and no bytes", self.what, self.shape)));
        }
        let (lowest, extent) = self.extent()?;
        let inside = lowest.checked_sub(base).filter(|offset| *offset <= length && extent <= length - offset);
        if inside.is_none() {
            return Err(Failed::misuse(format!(
                "{} is {extent} bytes at {lowest:#x}, not inside the {length} bytes at {base:#x} of the region: pass a view \
                 of what was registered",
                self.what
            )));
        }
        let mut outer: Vec<_> = self.dimensions().filter(|(size, _)| *size > 1).collect();
        let mut block = self.item_size;
        while let Some((size, _)) = outer.pop_if(|(_, stride)| *stride == block as i64) {
            block *= size;
        }
        let count = outer.iter().try_fold(1_u64, |count, (size, _)| count.checked_mul(*size));
        if count.is_none_or(|count| count > u64::from(u32::MAX)) {
            return Err(Failed::misuse(format!("{} has more than 2^32 - 1 blocks", self.what)));
        }
        let start = self.address.wrapping_sub(base);
        let mut offsets = vec![start];
        for (size, stride) in outer {
            let steps = 0..size as i64;
            let step = |offset: u64| steps.clone().map(move |at| offset.wrapping_add_signed(at * stride));
            offsets = offsets.into_iter().flat_map(step).collect();
        }
        Ok((block, offsets))
    }
}

fn objects(what: &str) -> Failed {
    Failed::misuse(format!(
        "{what} holds Python objects, whose pointers mean nothing to a peer: use a numeric type"
    ))
}

/// Bytes of an element by its type in the array interface, such as `<f4`.
fn item_size(typestr: &str, what: &str) -> Result<u64> {
    let invalid = || Failed::wrong_type(format!("the array interface of {what} has the type {typestr:?}"));
    let mut chars = typestr.chars();
    let (_order, kind) = (chars.next(), chars.next().ok_or_else(invalid)?);
    if kind == 'O' {
        return Err(objects(what));
    }
    // A date has its unit after the number.
    let digits: String = chars.take_while(char::is_ascii_digit).collect();
    let count: u64 = digits.parse().map_err(|_| invalid())?;
    match kind {
        't' => Err(Failed::unsupported(format!("{what} has elements of bits: view it as bytes"))),
        // Characters of 4 bytes.
        'U' => count.checked_mul(4).ok_or_else(invalid),
        _ => Ok(count),
    }
}
