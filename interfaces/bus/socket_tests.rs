//! The socket with a peer that writes what it likes.

use super::super::gate::{Gate, Limits};
use super::super::header::Unreadable;
use super::super::source::which;
use super::*;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use zbus::connection::Builder;
use zbus::{Guid, MessageStream};

/// A connection whose other end is a bare socket, past the handshake.
async fn connected(patience: Option<Duration>) -> (MessageStream, UnixStream, Arc<Intake>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let intake = Arc::new(Intake::default());
    let socket = Measured::new(ours, intake.clone(), patience);
    let server = Builder::socket(socket).server(Guid::generate()).p2p().build_message_stream();
    let (stream, theirs) = tokio::join!(server, super::super::tests::shake_hands(theirs));
    intake.begin(Box::new(|_| None));
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

/// The clock is paused: it goes on when nobody has anything left to do.
#[tokio::test(start_paused = true)]
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
    intake.begin(Box::new(|_| None));
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

/// What a call has brought, each file with what is read of it once nobody else can write there.
fn read_files(intake: &Intake, call: &Message, writes: Vec<std::io::PipeReader>) -> Vec<u8> {
    let Brought { files, .. } = intake.files(call).unwrap();
    let names: Vec<zbus::wire::OwnedFd> = call.body().deserialize().unwrap();
    assert!(files.len() == names.len() && files.len() == writes.len());
    for (number, name) in names.into_iter().enumerate() {
        let file = &files[which(OwnedFd::from(name)).unwrap()];
        let own = file.as_fd().try_clone_to_owned().unwrap();
        std::io::Write::write_all(&mut std::fs::File::from(own), &[number as u8]).unwrap();
    }
    drop(files);
    writes.into_iter().flat_map(|pipe| std::io::Read::bytes(pipe).map(Result::unwrap)).collect()
}

#[tokio::test]
async fn descriptors_of_a_call_that_may_bring_them_are_taken_and_no_others() {
    let (mut ours, theirs, intake) = connected_to_another().await;
    let gate = Gate::new(Limits::default());
    let places = gate.clone();
    let admits =
        move |call: Heading<'_>| (call.member == "Call").then(|| places.brings("a", call.descriptors)).flatten();
    intake.begin(Box::new(admits));
    let ((two, of_two), (three, of_three)) = (call_with_pipes(2), call_with_pipes(3));
    let other = Message::method_call("/", "Other").interface("a.b");
    let (held, ear) = std::io::pipe().map(|(ear, mouth)| (mouth, ear)).unwrap();
    let other = other.build(&vec![zbus::wire::OwnedFd::from(OwnedFd::from(held))]).unwrap();
    // A large one is read past the buffer, up to the one that brings something.
    let all = [call(7), two, call(3 << 20), other, three, call(1)];
    let connection = zbus::Connection::from(&theirs);
    let sending = tokio::spawn(async move { connection.send_all(&all).await });
    let mut came = Vec::new();
    for brings in [false, true, false, true, true, false] {
        let message = next(&mut ours).await;
        assert_eq!(brought_descriptors(&message), brings);
        intake.taken(message.data().len());
        came.push(message);
    }
    sending.await.unwrap().unwrap();
    assert!(intake.files(&came[0]).is_none());
    assert_eq!(read_files(&intake, &came[1], of_two), [0, 1]);
    assert!(intake.files(&came[3]).is_none() && came[3].data().fds().is_empty(), "nobody wanted these");
    assert_eq!(std::io::read_to_string(ear).unwrap(), "", "they are closed");
    assert_eq!(read_files(&intake, &came[4], of_three), [0, 1, 2]);
}

#[tokio::test]
async fn who_has_too_many_open_brings_no_more() {
    let (mut ours, theirs, intake) = connected_to_another().await;
    let gate = Gate::new(Limits::default());
    let places = gate.clone();
    intake.begin(Box::new(move |call| places.brings("a", call.descriptors)));
    let connection = zbus::Connection::from(&theirs);
    let ((first, of_first), (second, of_second)) = (call_with_pipes(16), call_with_pipes(1));
    connection.send_all(&[first, second]).await.unwrap();
    let (first, second) = (next(&mut ours).await, next(&mut ours).await);
    assert!(intake.files(&second).is_none() && brought_descriptors(&second) && second.data().fds().is_empty());
    let brought = intake.files(&first).unwrap();
    drop(of_second);
    drop(brought);
    // They are closed in threads of their own.
    for pipe in of_first {
        assert_eq!(std::io::read_to_string(pipe).unwrap(), "");
    }
    while gate.brings("a", 16).is_none() {
        tokio::task::yield_now().await;
    }
    let (third, of_third) = call_with_pipes(16);
    connection.send(&third).await.unwrap();
    drop(third);
    let third = next(&mut ours).await;
    assert_eq!(read_files(&intake, &third, of_third).len(), 16);
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
    let member = [&b"\x03\x01s\0"[..], &[4, 0, 0, 0], b"Call\0"].concat();
    let found = |fields: &[&[u8]]| Fields::of(&header(b'l', fields)).map(|found| found.call.descriptors);
    assert_eq!(found(&[&path, signature]), Ok(0));
    assert_eq!(found(&[fds]), Ok(2));
    let head = header(b'l', &[&path, signature, &wide, &member, fds]);
    let fields = Fields::of(&head).unwrap();
    assert_eq!(head[fields.descriptors_at..][..4], [2, 0, 0, 0]);
    assert_eq!(fields.call, Heading { member: "Call", descriptors: 2, ..Heading::default() });
    let path = [&b"\x01\x01o\0"[..], &[0, 0, 0, 1], b"/\0"].concat();
    assert_eq!(Fields::of(&header(b'B', &[&path, b"\x09\x01u\0\0\0\0\x02"])).unwrap().call.descriptors, 2);
    // Nothing in a header that does not hold what it says is read beyond its end.
    for cut in PRIMARY..head.len() {
        let fields = Fields::of(&head[..cut]).unwrap();
        assert!(fields.call.descriptors == 0 || fields.descriptors_at + 4 <= cut);
    }
    assert_eq!(found(&[b"\x63\x01v\0\x01u\0\0\0\0\0\0", fds]), Err(Unreadable));
    assert_eq!(found(&[b"\x63\x02as\0\0\0\0\0\0\0\0", fds]), Err(Unreadable));
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
