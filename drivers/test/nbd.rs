//! NBD as a server speaks it, for clients of the test driver: fixed newstyle, one export, read-only, with a dirty bitmap where the
//! backup is of what was written since a checkpoint.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// Options and requests that are larger are refused.
const MOST: u32 = 1 << 20;
/// The number of the one context there is.
const CONTEXT: u32 = 1;
const HAS_FLAGS_AND_IS_READ_ONLY: u16 = 3;
const INVALID: u32 = 22;
const NOT_PERMITTED: u32 = 1;

/// What is served.
#[derive(Clone, Debug)]
pub struct Export {
    pub name: String,
    pub content: Vec<u8>,
    /// The bitmap's name, and so many bytes at the beginning that it says were written.
    pub bitmap: Option<(String, u32)>,
}

/// What a client has said that it wants.
#[derive(Default)]
struct Session {
    no_zeroes: bool,
    structured: bool,
    has_context: bool,
}

/// How an option is answered.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Answer {
    Ack = 1,
    Server = 2,
    Info = 3,
    Context = 4,
    Unsupported = 0x8000_0001,
    Invalid = 0x8000_0003,
    Unknown = 0x8000_0006,
}

/// Serves one client until it leaves.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(mut line: S, export: &Export) -> io::Result<()> {
    line.write_all(b"NBDMAGIC").await?;
    line.write_u64(OPTION_MAGIC).await?;
    line.write_u16(3).await?;
    let mut session = Session { no_zeroes: line.read_u32().await? & 2 != 0, ..Session::default() };
    while let Some(goes_on) = option(&mut line, export, &mut session).await? {
        if goes_on {
            continue;
        }
        while request(&mut line, export, &session).await? {}
        return Ok(());
    }
    Ok(())
}

/// Answers an option: whether others may follow, or requests do. `None`: the client leaves.
async fn option<S: AsyncRead + AsyncWrite + Unpin>(
    line: &mut S,
    export: &Export,
    session: &mut Session,
) -> io::Result<Option<bool>> {
    let (magic, option, length) = (line.read_u64().await?, line.read_u32().await?, line.read_u32().await?);
    if magic != OPTION_MAGIC || length > MOST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut data = vec![0; usize::try_from(length).unwrap_or_default()];
    line.read_exact(&mut data).await?;
    let size = u64::try_from(export.content.len()).unwrap_or_default();
    match option {
        1 if data == export.name.as_bytes() => {
            line.write_u64(size).await?;
            line.write_u16(HAS_FLAGS_AND_IS_READ_ONLY).await?;
            if !session.no_zeroes {
                line.write_all(&[0; 124]).await?;
            }
            return Ok(Some(false));
        }
        // There is no other answer to that.
        1 => return Ok(None),
        2 => {
            answer(line, option, Answer::Ack, &[]).await?;
            return Ok(None);
        }
        3 => {
            let name = export.name.as_bytes();
            answer(
                line,
                option,
                Answer::Server,
                &[&u32::try_from(name.len()).unwrap_or_default().to_be_bytes(), name].concat(),
            )
            .await?;
            answer(line, option, Answer::Ack, &[]).await?;
        }
        6 | 7 => match text(&data) {
            None => answer(line, option, Answer::Invalid, &[]).await?,
            Some((name, _)) if name != export.name.as_bytes() => answer(line, option, Answer::Unknown, &[]).await?,
            Some(_) => {
                let told = [&0u16.to_be_bytes()[..], &size.to_be_bytes(), &HAS_FLAGS_AND_IS_READ_ONLY.to_be_bytes()];
                answer(line, option, Answer::Info, &told.concat()).await?;
                answer(line, option, Answer::Ack, &[]).await?;
                return Ok(Some(option == 6));
            }
        },
        8 => {
            session.structured = true;
            answer(line, option, Answer::Ack, &[]).await?;
        }
        9 | 10 => {
            let context = export.bitmap.as_ref().map(|(name, _)| format!("qemu:dirty-bitmap:{name}"));
            let wanted = context.filter(|context| asks_for(&data, context));
            if let Some(context) = &wanted {
                let told = [&CONTEXT.to_be_bytes()[..], context.as_bytes()].concat();
                answer(line, option, Answer::Context, &told).await?;
            }
            session.has_context |= option == 10 && session.structured && wanted.is_some();
            answer(line, option, Answer::Ack, &[]).await?;
        }
        _ => answer(line, option, Answer::Unsupported, &[]).await?,
    }
    line.flush().await?;
    Ok(Some(true))
}

async fn answer<S: AsyncWrite + Unpin>(line: &mut S, option: u32, how: Answer, data: &[u8]) -> io::Result<()> {
    line.write_u64(OPTION_REPLY).await?;
    line.write_u32(option).await?;
    line.write_u32(how as u32).await?;
    line.write_u32(u32::try_from(data.len()).unwrap_or_default()).await?;
    line.write_all(data).await
}

/// A text with its length before it, and what follows.
fn text(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)
}

/// Whether contexts are asked for and this is among them; none in particular are all.
fn asks_for(data: &[u8], context: &str) -> bool {
    let Some((_, rest)) = text(data) else { return false };
    let Some((count, mut rest)) = rest.split_first_chunk::<4>() else { return false };
    let count = u32::from_be_bytes(*count);
    let mut found = count == 0;
    for _ in 0..count {
        let Some((query, more)) = text(rest) else { return false };
        found |= query == context.as_bytes() || query == b"qemu:" || query == b"qemu:dirty-bitmap:";
        rest = more;
    }
    found
}

/// Answers a request; whether the client stays.
async fn request<S: AsyncRead + AsyncWrite + Unpin>(
    line: &mut S,
    export: &Export,
    session: &Session,
) -> io::Result<bool> {
    let magic = line.read_u32().await?;
    let (_flags, kind, cookie) = (line.read_u16().await?, line.read_u16().await?, line.read_u64().await?);
    let (offset, length) = (line.read_u64().await?, line.read_u32().await?);
    if magic != REQUEST {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let start = usize::try_from(offset).ok();
    let end = start.and_then(|start| start.checked_add(usize::try_from(length).ok()?));
    let wanted = start.zip(end).and_then(|(start, end)| export.content.get(start..end)).filter(|_| length <= MOST);
    match (kind, wanted) {
        (0, Some(content)) if session.structured => {
            chunk(line, 1, cookie, &[&offset.to_be_bytes()[..], content].concat()).await?;
        }
        (0, Some(content)) => {
            simple(line, 0, cookie).await?;
            line.write_all(content).await?;
        }
        (0 | 7, _) if session.structured && (kind == 0 || wanted.is_none() || !session.has_context) => {
            let why = [&INVALID.to_be_bytes()[..], &0u16.to_be_bytes()].concat();
            chunk(line, 0x8001, cookie, &why).await?;
        }
        (7, Some(_)) => {
            let dirty = u64::from(export.bitmap.as_ref().map_or(0, |(_, dirty)| *dirty));
            let first = u32::try_from(dirty.saturating_sub(offset)).unwrap_or_default().min(length);
            let extents = [(first, 1u32), (length - first, 0)].into_iter().filter(|(length, _)| *length > 0);
            let told = extents.flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()].concat());
            chunk(line, 5, cookie, &CONTEXT.to_be_bytes().into_iter().chain(told).collect::<Vec<u8>>()).await?;
        }
        (2, _) => return Ok(false),
        (3, _) => simple(line, 0, cookie).await?,
        (1, _) => {
            // What is written is read, and refused.
            tokio::io::copy(&mut line.take(length.into()), &mut tokio::io::sink()).await?;
            simple(line, NOT_PERMITTED, cookie).await?;
        }
        _ => simple(line, INVALID, cookie).await?,
    }
    line.flush().await?;
    Ok(true)
}

async fn simple<S: AsyncWrite + Unpin>(line: &mut S, error: u32, cookie: u64) -> io::Result<()> {
    line.write_u32(SIMPLE_REPLY).await?;
    line.write_u32(error).await?;
    line.write_u64(cookie).await
}

/// The one chunk of a structured reply.
async fn chunk<S: AsyncWrite + Unpin>(line: &mut S, kind: u16, cookie: u64, data: &[u8]) -> io::Result<()> {
    line.write_u32(STRUCTURED_REPLY).await?;
    line.write_u16(1).await?;
    line.write_u16(kind).await?;
    line.write_u64(cookie).await?;
    line.write_u32(u32::try_from(data.len()).unwrap_or_default()).await?;
    line.write_all(data).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// QEMU's tools read it, and what was written since.
    #[tokio::test(flavor = "multi_thread")]
    async fn tools_read_what_is_served() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            return eprintln!("SKIPPED: qemu-img is not installed");
        }
        let folder = tempfile::tempdir().unwrap();
        let (path, copy) = (folder.path().join("nbd"), folder.path().join("copy"));
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let mut content = vec![7; 1 << 20];
        content[3] = 9;
        let export = Export { name: "vda".into(), content: content.clone(), bitmap: Some(("new".into(), 65536)) };
        let served = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let export = export.clone();
                tokio::spawn(async move { serve(client, &export).await });
            }
        });
        let image = format!("driver=nbd,export=vda,server.type=unix,server.path={}", path.display());
        let dirty = format!("{image},x-dirty-bitmap=qemu:dirty-bitmap:new");
        let to = copy.clone();
        let told = tokio::task::spawn_blocking(move || {
            let convert =
                Command::new("qemu-img").args(["convert", "--image-opts", &image, "-O", "raw"]).arg(&to).output();
            let map = Command::new("qemu-img").args(["map", "--output=json", "--image-opts", &dirty]).output();
            (convert.unwrap(), map.unwrap())
        });
        let (convert, map) = told.await.unwrap();
        served.abort();
        assert!(convert.status.success(), "{}", String::from_utf8_lossy(&convert.stderr));
        assert!(std::fs::read(&copy).unwrap() == content);
        let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
        let dirty: Vec<_> = map.as_array().unwrap().iter().filter(|one| one["data"] == false).collect();
        assert_eq!((dirty.len(), &dirty[0]["start"], &dirty[0]["length"]), (1, &0.into(), &65536.into()), "{map}");
    }
}
