//! The socket with a peer that writes what it likes.

use super::*;
use futures_util::StreamExt;
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
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::os::fd::AsFd;
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
