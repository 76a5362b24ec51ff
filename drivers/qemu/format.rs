//! QEMU's words for the formats of images.

/// Whether images of this format stand on others.
pub fn has_backing(format: &str) -> bool {
    matches!(format, "qcow2" | "qcow" | "qed" | "vmdk")
}

/// QEMU's word for an image format; `None` for one that we do not hand to it.
pub fn known_format(format: &str) -> Option<&'static str> {
    Some(match format {
        "raw" | "iso" => "raw",
        "qcow2" => "qcow2",
        "qcow" => "qcow",
        "qed" => "qed",
        "vmdk" => "vmdk",
        "vdi" => "vdi",
        "vpc" | "vhd" => "vpc",
        "vhdx" => "vhdx",
        "parallels" => "parallels",
        "bochs" => "bochs",
        "cloop" => "cloop",
        "dmg" => "dmg",
        _ => return None,
    })
}
