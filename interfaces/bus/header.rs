//! The header of a message, before anything is made of it.

/// A message's first part, of which its whole length can be told.
pub const PRIMARY: usize = 16;

/// A call, before it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heading<'h> {
    /// Who the bus says sent it; empty at a peer.
    pub sender: &'h str,
    /// The interface called.
    pub interface: &'h str,
    /// The member called.
    pub member: &'h str,
    /// How many descriptors it has.
    pub descriptors: usize,
}

/// How long header (with what fills it up to the body) and body of a message are, of which this is the first part.
pub fn lengths(primary: &[u8]) -> (usize, usize) {
    let number = |at: usize| {
        let bytes = [primary[at], primary[at + 1], primary[at + 2], primary[at + 3]];
        let number = if primary[0] == b'B' { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) };
        number as usize
    };
    ((PRIMARY + number(12)).next_multiple_of(8), number(4))
}

/// A field of a header has a type that no field of the specification has, so what follows cannot be told.
#[derive(Debug, PartialEq, Eq)]
pub struct Unreadable;

/// What stands in a header.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fields<'h> {
    /// Of a call.
    pub call: Heading<'h>,
    /// Where the number of descriptors stands, if there is any.
    pub descriptors_at: usize,
}

impl Fields<'_> {
    /// Those of a whole header.
    pub fn of(head: &[u8]) -> Result<Fields<'_>, Unreadable> {
        const INTERFACE: u8 = 2;
        const MEMBER: u8 = 3;
        const SENDER: u8 = 7;
        const UNIX_FDS: u8 = 9;
        let number = |at: usize| {
            let bytes = head.get(at..at + 4)?.try_into().ok()?;
            let number = if head[0] == b'B' { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) };
            usize::try_from(number).ok()
        };
        let text = |at: usize| {
            let bytes = head.get(at + 4..)?.get(..number(at)?)?;
            std::str::from_utf8(bytes).ok()
        };
        let mut fields = Fields::default();
        let end = number(12).map_or(0, |length| PRIMARY + length);
        let mut at = PRIMARY;
        while let Some([code, signature, kind, _]) = head.get(at..at + 4).filter(|_| at < end) {
            if *signature != 1 {
                return Err(Unreadable);
            }
            at += 4;
            match (*code, kind) {
                (INTERFACE, b's') => fields.call.interface = text(at).unwrap_or_default(),
                (MEMBER, b's') => fields.call.member = text(at).unwrap_or_default(),
                (SENDER, b's') => fields.call.sender = text(at).unwrap_or_default(),
                (UNIX_FDS, b'u') => {
                    fields.descriptors_at = at;
                    fields.call.descriptors = number(at).unwrap_or_default();
                }
                _ => {}
            }
            let after = match kind {
                b'y' => Some(at + 1),
                b'n' | b'q' => Some(at + 2),
                b'b' | b'i' | b'u' | b'h' => Some(at + 4),
                b'x' | b't' | b'd' => Some(at.next_multiple_of(8) + 8),
                b's' | b'o' => number(at).map(|length| at + 4 + length + 1),
                b'g' => head.get(at).map(|length| at + 1 + usize::from(*length) + 1),
                _ => return Err(Unreadable),
            };
            let Some(after) = after else { break };
            at = after.next_multiple_of(8);
        }
        Ok(fields)
    }
}
