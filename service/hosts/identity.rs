//! What machines of other hosts are called here. A host may have two of one uuid or name, and other hosts, or we ourselves, the
//! same ones: whoever was first keeps both, and the others get what nobody has.

use uuid::{Builder, Uuid};
use virt_model::driver::inventory::Key;

/// The uuid of a machine whose own another one has: the same whenever it is asked for.
pub(super) fn second_uuid(host: &str, key: &Key) -> Uuid {
    let mut text = Uuid::NAMESPACE_URL.as_bytes().to_vec();
    text.extend_from_slice(format!("virt:{host}/{key}").as_bytes());
    let digest = sha1(&text);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    Builder::from_sha1_bytes(bytes).into_uuid()
}

/// The names that a machine may have here, the first that is free.
pub(super) fn names(host: &str, name: &str, key: &Key) -> [String; 3] {
    [name.to_owned(), format!("{name}@{host}"), format!("{name}@{host} ({key})")]
}

/// SHA-1, of which the uuids of RFC 9562, version 5, are made; it protects nothing.
fn sha1(text: &[u8]) -> [u8; 20] {
    let mut state: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    let mut padded = text.to_vec();
    padded.push(0x80);
    padded.resize((padded.len() + 8).next_multiple_of(64) - 8, 0);
    padded.extend_from_slice(&(8 * text.len() as u64).to_be_bytes());
    for block in padded.chunks_exact(64) {
        let mut words = [0u32; 80];
        for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
            *word = bytes.iter().fold(0, |word, byte| word << 8 | u32::from(*byte));
        }
        for at in 16..80 {
            words[at] = (words[at - 3] ^ words[at - 8] ^ words[at - 14] ^ words[at - 16]).rotate_left(1);
        }
        let [mut a, mut b, mut c, mut d, mut e] = state;
        for (at, word) in words.iter().enumerate() {
            let (mixed, constant) = match at / 20 {
                0 => (b & c | !b & d, 0x5a82_7999),
                1 => (b ^ c ^ d, 0x6ed9_eba1),
                2 => (b & c | b & d | c & d, 0x8f1b_bcdc),
                _ => (b ^ c ^ d, 0xca62_c1d6u32),
            };
            let next = a.rotate_left(5).wrapping_add(mixed).wrapping_add(e).wrapping_add(constant).wrapping_add(*word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        }
        for (sum, one) in state.iter_mut().zip([a, b, c, d, e]) {
            *sum = sum.wrapping_add(one);
        }
    }
    let mut digest = [0; 20];
    digest.chunks_exact_mut(4).zip(state).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_be_bytes()));
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_uuid_is_one_of_version_5() {
        let hex = |digest: [u8; 20]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        // The vectors of FIPS 180.
        assert_eq!(hex(sha1(b"abc")), "a9993e364706816aba3e25717850c26c9cd0d89d");
        let long = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
        assert_eq!(hex(sha1(long)), "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
        let key = Key("vm-7".into());
        let uuid = second_uuid("lab", &key);
        assert_eq!((uuid.get_version_num(), uuid), (5, second_uuid("lab", &key)));
        assert_ne!(uuid, second_uuid("lab2", &key));
    }
}
