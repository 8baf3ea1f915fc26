//! Extracts the ELF image of the kernel from a bzImage.
//!
//! A bzImage decompresses itself in the guest, which takes seconds under software
//! emulation. The ELF image inside boots at once through its PVH entry. See the
//! kernel's Documentation/arch/x86/boot.rst for the layout.

use crate::process::decompressed;
use anyhow::{Context, Result, bail};

/// Offsets of fields in the setup header.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// The compressed payload of a bzImage.
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

/// The ELF image inside a bzImage, or why it cannot be used.
pub fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image).context("not a bzImage")?;
    if !payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        bail!("not compressed with zstd");
    }
    // The last 4 bytes are the length of the ELF image, not compressed data.
    let elf = decompressed("zst", payload[..payload.len() - 4].to_vec())?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("not an ELF image");
    }
    // QEMU needs a PVH note (owner `Xen`, type 18), which a kernel without
    // CONFIG_PVH lacks.
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
    fn the_header_gives_the_payload() {
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
