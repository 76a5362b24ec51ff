//! The socket with a peer that writes what it likes.

use super::*;
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt as _;
use zbus::connection::Builder;
use zbus::{Guid, MessageStream};

/// A connection whose other end is a bare socket, past the handshake.
async fn connected(patience: Option<Duration>) -> (MessageStream, UnixStream, Arc<Intake>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let intake = Arc::new(Intake::default());
    let socket = Measured::new(ours, intake.clone(), patience);
    let server = Builder::socket(socket).server(Guid::generate()).p2p().build_message_stream();
    let (stream, theirs) = tokio::join!(server, super::super::tests::shake_hands(theirs));
    intake.begin();
    (stream.unwrap(), theirs, intake)
}

/// A call with a body of so many bytes and a little more.
fn call(bytes: usize) -> Message {
    Message::method_call("/", "Call").interface("a.b").build(&"x".repeat(bytes)).unwrap()
}

async fn next(stream: &mut MessageStream) -> Message {
    stream.next().await.unwrap().unwrap()
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_not_read_and_the_next_message_is() {
    let (mut stream, mut peer, intake) = connected(None).await;
    let writing = tokio::spawn(async move {
        for bytes in [10, LARGEST + 1, 100 << 20, LARGEST - 64] {
            peer.write_all(call(bytes).data()).await.unwrap();
        }
        peer
    });
    let small = next(&mut stream).await;
    assert!(!is_cut(&small) && small.body().deserialize::<&str>().unwrap() == "xxxxxxxxxx");
    intake.taken(small.data().len());
    for _ in 0..2 {
        let cut = next(&mut stream).await;
        assert!(is_cut(&cut) && cut.body().is_empty() && cut.header().member().unwrap() == "Call");
        intake.taken(cut.data().len());
    }
    let large = next(&mut stream).await;
    assert!(!is_cut(&large) && large.data().len() > LARGEST - 64);
    writing.await.unwrap();
}

#[tokio::test]
async fn a_header_beyond_the_limit_is_passed_over() {
    let (mut stream, mut peer, _intake) = connected(None).await;
    let path = format!("/{}", "x".repeat(30 << 20));
    let long = Message::method_call(path, "Call").interface("a.b").build(&()).unwrap();
    let writing = tokio::spawn(async move {
        peer.write_all(long.data()).await.unwrap();
        peer.write_all(call(1).data()).await.unwrap();
        peer
    });
    assert_eq!(next(&mut stream).await.header().path().unwrap().as_str(), "/");
    writing.await.unwrap();
}

#[tokio::test]
async fn nobody_else_can_set_the_mark() {
    let (mut stream, mut peer, _intake) = connected(None).await;
    let mut marked = call(1).data().to_vec();
    marked[2] |= CUT;
    peer.write_all(&marked).await.unwrap();
    assert!(!is_cut(&next(&mut stream).await));
}

#[tokio::test]
async fn no_more_is_read_than_the_dispatcher_has_room_for() {
    let (mut stream, mut peer, intake) = connected(None).await;
    let size = call(1 << 20).data().len();
    let writing = tokio::spawn(async move {
        for _ in 0..64 {
            peer.write_all(call(1 << 20).data()).await.unwrap();
        }
        peer
    });
    // Whoever takes nothing is sent nothing; whoever takes on gets all of it.
    let mut taken = 0;
    for _ in 0..64 {
        let message = next(&mut stream).await;
        assert!(intake.lock().unwrap() <= QUEUED);
        taken += message.data().len();
        intake.taken(message.data().len());
    }
    assert_eq!(taken, 64 * size);
    writing.await.unwrap();
    assert_eq!(*intake.lock(), Some(0));
}

#[tokio::test]
async fn a_dispatcher_that_takes_nothing_is_not_read_for() {
    let (_stream, mut peer, intake) = connected(None).await;
    let mut sent = 0;
    let piece = call(1 << 20);
    while tokio::time::timeout(Duration::from_secs(1), peer.write_all(piece.data())).await.is_ok() {
        sent += piece.data().len();
        assert!(sent < 2 * QUEUED, "somebody reads all this");
    }
    assert!(intake.lock().unwrap() <= QUEUED);
}

#[tokio::test]
async fn descriptors_are_closed_unread() {
    let (mut stream, peer, _intake) = connected(None).await;
    let (held, sent) = std::io::pipe().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [sent.as_fd(); 16];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let message = call(1);
    peer.writable().await.unwrap();
    let count = sendmsg(&peer, &[IoSlice::new(message.data())], &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(count, message.data().len());
    assert!(next(&mut stream).await.data().fds().is_empty());
    drop(sent);
    // Nobody has the other end any more: it is at its end.
    let mut nothing = Vec::new();
    std::io::Read::read_to_end(&mut { held }, &mut nothing).unwrap();
}

/// A connection whose other end is one of zbus's own.
async fn connected_to_another() -> (MessageStream, MessageStream, Arc<Intake>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let intake = Arc::new(Intake::default());
    let socket = Measured::new(ours, intake.clone(), None);
    let server = Builder::socket(socket).server(Guid::generate()).p2p().build_message_stream();
    let client = Builder::unix_stream(theirs.into_std().unwrap()).p2p().build_message_stream();
    let (server, client) = tokio::join!(server, client);
    intake.begin();
    (server.unwrap(), client.unwrap(), intake)
}

/// A call that carries the ends of so many pipes, and their other ends.
fn call_with_pipes(count: usize) -> (Message, Vec<std::io::PipeReader>) {
    let (readers, writers): (Vec<_>, Vec<_>) = (0..count).map(|_| std::io::pipe().unwrap()).unzip();
    let writers: Vec<zbus::wire::OwnedFd> = writers.into_iter().map(|pipe| OwnedFd::from(pipe).into()).collect();
    let call = Message::method_call("/", "Call").interface("a.b");
    (call.build(&writers).unwrap(), readers)
}

#[tokio::test]
async fn descriptors_go_out_with_their_message() {
    let (ours, mut theirs, _intake) = connected_to_another().await;
    let ((one, mut of_one), (three, mut of_three)) = (call_with_pipes(1), call_with_pipes(3));
    let all = [call(7), one, call(1 << 10), call(3), three, call(1)];
    let counts: Vec<usize> = all.iter().map(|message| message.data().fds().len()).collect();
    zbus::Connection::from(&ours).send_all(&all).await.unwrap();
    drop(all);
    let mut came = Vec::new();
    for _ in &counts {
        came.push(next(&mut theirs).await);
    }
    assert_eq!(came.iter().map(|message| message.data().fds().len()).collect::<Vec<_>>(), counts);
    let pipes: Vec<zbus::wire::OwnedFd> = came[4].body().deserialize().unwrap();
    drop(came);
    for (number, pipe) in pipes.into_iter().enumerate() {
        std::io::Write::write_all(&mut std::fs::File::from(OwnedFd::from(pipe)), &[number as u8]).unwrap();
    }
    for (number, pipe) in of_three.iter_mut().enumerate() {
        let mut read = Vec::new();
        std::io::Read::read_to_end(pipe, &mut read).unwrap();
        assert_eq!(read, [number as u8], "nobody else has it");
    }
    assert_eq!(std::io::Read::read(&mut of_one[0], &mut [0]).unwrap(), 0, "whoever had it has let go");
}

/// Who says nothing of descriptors at the beginning takes none: that costs an answer that has one, and no other.
#[tokio::test]
async fn an_answer_with_a_descriptor_is_lost_where_none_can_be_sent() {
    let (ours, mut theirs, _intake) = connected(None).await;
    let outbox = Arc::new(crate::bus::outbox::Outbox::default());
    let (with, mut pipes) = call_with_pipes(1);
    let without = [call(5), call(6)];
    [without[0].clone(), with, without[1].clone()].into_iter().for_each(|message| outbox.push(message));
    let (writing, connection) = (outbox.clone(), zbus::Connection::from(&ours));
    let writing = tokio::spawn(async move { writing.write_to(&connection).await });
    let mut came = vec![0; without.iter().map(|message| message.data().len()).sum()];
    theirs.read_exact(&mut came).await.unwrap();
    assert!(came.starts_with(without[0].data()) && came.ends_with(without[1].data()));
    assert_eq!(std::io::Read::read(&mut pipes[0], &mut [0]).unwrap(), 0, "it is closed");
    outbox.close();
    writing.await.unwrap();
}

#[tokio::test]
async fn a_message_that_brought_descriptors_is_told_from_others() {
    let (mut ours, theirs, _intake) = connected_to_another().await;
    let (brings, mut pipes) = call_with_pipes(2);
    zbus::Connection::from(&theirs).send_all(&[call(1), brings.clone(), call(2)]).await.unwrap();
    drop(brings);
    for brought in [false, true, false] {
        let message = next(&mut ours).await;
        assert_eq!(brought_descriptors(&message), brought);
        assert!(message.data().fds().is_empty() && message.header().member().unwrap() == "Call");
    }
    for pipe in &mut pipes {
        assert_eq!(std::io::Read::read(pipe, &mut [0]).unwrap(), 0, "it is closed");
    }
}

/// A header with these fields before that of the descriptors, in the order of bytes that it says.
fn header(order: u8, fields: &[&[u8]]) -> Vec<u8> {
    let number = |number: u32| if order == b'B' { number.to_be_bytes() } else { number.to_le_bytes() };
    let mut head = [&[order, 1, 0, 1][..], &[0; 12]].concat();
    for field in fields {
        head.resize(head.len().next_multiple_of(8), 0);
        head.extend_from_slice(field);
    }
    let length = u32::try_from(head.len() - PRIMARY).unwrap();
    head[12..16].copy_from_slice(&number(length));
    head.resize(head.len().next_multiple_of(8), 0);
    head
}

#[test]
fn what_a_header_says_of_descriptors_is_found_behind_fields_of_any_kind() {
    let path = [&b"\x01\x01o\0"[..], &[1, 0, 0, 0], b"/\0"].concat();
    let signature = b"\x08\x01g\0\x02ah\0";
    let wide = [&b"\x63\x01t\0\0\0\0\0"[..], &[9; 8]].concat();
    let fds = b"\x09\x01u\0\x02\0\0\0";
    let found = |fields: &[&[u8]]| descriptors_at(&header(b'l', fields)).map_err(|_| "passed over");
    assert_eq!(found(&[&path, signature]), Ok(None));
    assert_eq!(found(&[fds]), Ok(Some(20)));
    let head = header(b'l', &[&path, signature, &wide, fds]);
    let at = descriptors_at(&head).ok().flatten().unwrap();
    assert_eq!(head[at..at + 4], [2, 0, 0, 0]);
    let path = [&b"\x01\x01o\0"[..], &[0, 0, 0, 1], b"/\0"].concat();
    assert!(matches!(descriptors_at(&header(b'B', &[&path, fds])), Ok(Some(_))));
    // Nothing in a header that does not hold what it says is read beyond its end.
    for cut in PRIMARY..head.len() {
        assert!(descriptors_at(&head[..cut]).is_ok_and(|at| at.is_none_or(|at| at + 4 <= cut)));
    }
    assert_eq!(found(&[b"\x63\x01v\0\x01u\0\0\0\0\0\0", fds]), Err("passed over"));
    assert_eq!(found(&[b"\x63\x02as\0\0\0\0\0\0\0\0", fds]), Err("passed over"));
}

#[tokio::test]
async fn who_takes_nothing_is_left() {
    let (mut stream, _peer, intake) = connected(Some(Duration::from_millis(100))).await;
    let connection = zbus::Connection::from(&stream);
    let large = call(8 << 20);
    assert!(connection.send(&large).await.is_err());
    assert!(intake.stalled());
    while let Some(Ok(_)) = stream.next().await {}
    connection.closed().await;
}
