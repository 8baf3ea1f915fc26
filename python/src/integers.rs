//! Integers of Python, most often an array of numpy's, as numbers of a table.

use std::iter::Map;
use std::ops::Range;

use pyo3::buffer::{ElementType, PyUntypedBuffer};
use pyo3::prelude::*;

use crate::access::name;
use crate::error::{Failed, Result};

/// Non-negative integers: those of an array, in place, or those of an iterable, copied.
pub enum Integers {
    Array { buffer: PyUntypedBuffer, width: usize, signed: bool },
    List(Vec<u64>),
}

/// The numbers in order. The iterator knows its length, so a table is filled without a copy in between.
pub type Numbers<'a> = Map<Range<usize>, &'a mut dyn FnMut(usize) -> u64>;

impl Integers {
    /// `what` is the argument, for a message.
    pub fn of(argument: &Bound<'_, PyAny>, what: &str) -> Result<Self> {
        let Ok(buffer) = PyUntypedBuffer::get(argument) else { return Self::of_iterable(argument, what) };
        let (signed, width) = match ElementType::from_format(buffer.format()) {
            ElementType::SignedInteger { bytes } => (true, bytes),
            ElementType::UnsignedInteger { bytes } => (false, bytes),
            ElementType::Bool => {
                return Err(Failed::wrong_type(format!(
                    "{what} take integers, and this array is a mask: pass numpy.flatnonzero(mask)"
                )));
            }
            _ => {
                let format = buffer.format().to_string_lossy().into_owned();
                return Err(Failed::wrong_type(format!(
                    "{what} take integers, and this array has the format {format:?}: convert it with astype(numpy.int64)"
                )));
            }
        };
        if buffer.dimensions() != 1 || buffer.suboffsets().is_some() {
            let shape = buffer.shape();
            return Err(Failed::misuse(format!(
                "{what} take one dimension, and this array has the shape {shape:?}"
            )));
        }
        // Another byte order than this machine's.
        let order = buffer.format().to_bytes().first().copied();
        let foreign = if cfg!(target_endian = "little") { [b'>', b'!'] } else { [b'<', b'<'] };
        if width > 1 && order.is_some_and(|order| foreign.contains(&order)) {
            return Err(Failed::wrong_type(format!("{what} take integers in this machine's byte order")));
        }
        Ok(Self::Array { buffer, width, signed })
    }

    fn of_iterable(argument: &Bound<'_, PyAny>, what: &str) -> Result<Self> {
        let items = argument.try_iter().map_err(|_| {
            Failed::wrong_type(format!(
                "{what} take an array of integers or an iterable, not {}",
                name(argument)
            ))
        })?;
        let number = |(at, item): (usize, PyResult<Bound<'_, PyAny>>)| -> Result<u64> {
            let item = item?;
            item.extract::<u64>().map_err(|_| {
                let text = item.repr().map_or_else(|_| name(&item), |text| text.to_string());
                Failed::misuse(format!("{what}: number {at} is {text}, not an integer from 0 to 2**64 - 1"))
            })
        };
        Ok(Self::List(items.enumerate().map(number).collect::<Result<_>>()?))
    }

    pub fn len(&self) -> usize {
        match self {
            Self::Array { buffer, .. } => buffer.item_count(),
            Self::List(all) => all.len(),
        }
    }

    /// The number at a position. The first negative one is kept in `negative`, and stands for 2^64 - 1, which lies in no
    /// memory.
    fn get(&self, index: usize, negative: &mut Option<(usize, i64)>) -> u64 {
        let (buffer, width, signed) = match self {
            Self::List(all) => return all[index],
            Self::Array { buffer, width, signed } => (buffer, *width, *signed),
        };
        let stride = buffer.strides().first().copied().unwrap_or(width as isize);
        let at = buffer.buf_ptr().cast::<u8>().cast_const();
        let mut bytes = [0; 8];
        // SAFETY: `index` is below the length of the only dimension, so the element lies in the buffer, which is held and
        // whose elements have at most 8 bytes. Nobody writes them meanwhile: the caller has the GIL.
        unsafe {
            let from = at.offset(stride * index as isize);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), width);
        }
        let number = u64::from_le_bytes(bytes);
        if !signed {
            return number;
        }
        let shift = 64 - 8 * width as u32;
        let value = ((number << shift) as i64) >> shift;
        if value < 0 {
            negative.get_or_insert((index, value));
            return u64::MAX;
        }
        value as u64
    }

    /// Calls `make` with the numbers. Negative ones are refused by their position.
    pub fn with<T, E: Into<Failed>>(
        &self,
        what: &str,
        make: impl FnOnce(Numbers<'_>) -> Result<T, E>,
    ) -> Result<T> {
        let mut negative = None;
        let mut get = |index| self.get(index, &mut negative);
        let get: &mut dyn FnMut(usize) -> u64 = &mut get;
        let made = make((0..self.len()).map(get));
        if let Some((at, value)) = negative {
            return Err(Failed::misuse(format!("{what}: number {at} is {value}, and none may be negative")));
        }
        made.map_err(Into::into)
    }
}
