//! The kernel out of its wrapping.
//!
//! A bzImage unpacks itself in the guest, which costs seconds under software
//! emulation. The ELF inside starts at once through its PVH entry, so it is
//! unpacked here instead (the kernel's Documentation/arch/x86/boot.rst says
//! where it lies).

use crate::process::decompressed;
use anyhow::{Context, Result, bail};

/// The setup header's fields: number of setup sectors, magic, payload.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The payload of a bzImage, still compressed.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let sectors = match image[SETUP_SECTORS] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    image.get(start..start + word(PAYLOAD_LENGTH)?)
}

/// The ELF image inside a bzImage, or why it cannot be had.
pub fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image).context("not a bzImage")?;
    if !payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        bail!("not compressed with zstd");
    }
    // The length of the ELF image follows the compressed stream.
    let elf = decompressed("zst", payload[..payload.len() - 4].to_vec())?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("not an ELF image");
    }
    // Without a PVH note QEMU cannot start it. The note's owner and type are
    // `Xen` and 18; a kernel without CONFIG_PVH has no such note.
    let note = [4u32, 4, 18].map(u32::to_le_bytes).concat();
    let note = [note.as_slice(), b"Xen\0"].concat();
    let long = [4u32, 8, 18].map(u32::to_le_bytes).concat();
    let long = [long.as_slice(), b"Xen\0"].concat();
    if !elf.windows(note.len()).any(|w| w == note || w == long) {
        bail!("no PVH entry");
    }
    Ok(elf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_lies_where_the_header_says() {
        let mut image = vec![0; 4096];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET] = 16;
        image[PAYLOAD_LENGTH] = 4;
        image[1040..1044].copy_from_slice(b"abcd");
        assert_eq!(payload(&image), Some(&b"abcd"[..]));
        assert!(extract(&image).is_err());
        assert_eq!(payload(b"short"), None);
        image[PAYLOAD_LENGTH + 3] = 1;
        assert_eq!(payload(&image), None);
    }
}
