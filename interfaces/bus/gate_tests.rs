//! Who is admitted, and what they give back.

use super::*;

fn call() -> Message {
    Message::method_call("/", "Ping").build(&()).unwrap()
}

fn gate(limits: Limits) -> Gate {
    Gate::new(limits)
}

fn small() -> Limits {
    Limits { running: 2, waiting: 3, ..Limits::default() }
}

#[test]
fn a_sender_has_its_share_and_no_more() {
    let gate = gate(small());
    assert_eq!(gate.admit("a", call()), Admission::Stranger);
    assert!(gate.next().is_none(), "nobody runs before it is known who asks");
    gate.identified("a", Some(1000));
    let (one, two) = (gate.next(), {
        gate.admit("a", call());
        gate.next()
    });
    assert!(one.is_some() && two.is_some());
    for _ in 0..3 {
        assert_eq!(gate.admit("a", call()), Admission::Queued);
    }
    assert!(matches!(gate.admit("a", call()), Admission::Refused(_)));
    assert!(gate.next().is_none());
    let one = one.unwrap();
    gate.ended("a", one.uid, one.message.data().len());
    assert!(gate.next().is_some());
    assert_eq!(gate.admit("a", call()), Admission::Queued);
}

#[test]
fn senders_take_turns() {
    let gate = gate(Limits { running_in_all: 1, ..Limits::default() });
    for sender in ["a", "a", "a", "b", "c"] {
        gate.admit(sender, call());
        gate.identified(sender, Some(7));
    }
    let mut order = String::new();
    while let Some(work) = gate.next() {
        order.push_str(&work.sender);
        gate.ended(&work.sender, work.uid, work.message.data().len());
    }
    assert_eq!(order, "abcaa");
}

#[test]
fn a_user_cannot_fill_the_house_with_connections() {
    let gate = gate(Limits { running_of_user: 3, ..Limits::default() });
    for number in 0..10 {
        gate.admit(&format!(":1.{number}"), call());
        gate.identified(&format!(":1.{number}"), Some(1000));
    }
    let running: Vec<_> = std::iter::from_fn(|| gate.next()).collect();
    assert_eq!(running.len(), 3);
    gate.admit("other", call());
    gate.identified("other", Some(1001));
    assert_eq!(gate.next().map(|work| work.uid), Some(1001));
}

#[test]
fn leaving_gives_everything_back() {
    let limits = Limits { bytes: 4096, bytes_in_all: 8192, unread: Some(Unread::default()), ..Limits::default() };
    let gate = gate(limits);
    gate.admit("a", call());
    gate.identified("a", Some(1));
    gate.answered("a", 100);
    assert!(gate.takes_descriptors("a", 1));
    let work = gate.next().unwrap();
    while gate.admit("a", call()) == Admission::Queued {}
    gate.left("a");
    assert!(gate.next().is_none() && work.departed.is_cancelled());
    gate.ended("a", work.uid, work.message.data().len());
    let state = gate.lock();
    assert_eq!((state.bytes, state.unread, state.descriptors, state.running), (0, 0, 0, 0));
    assert_eq!((state.users.len(), state.turns.len(), state.senders.len()), (0, 0, 0));
    drop(state);
    assert_eq!(gate.admit("b", call()), Admission::Stranger);
}

/// As many calls as the user's senders, of which each has a few, may bring in.
fn fill(gate: &Gate, uid: u32) -> usize {
    let mut taken = 0;
    for number in 0.. {
        let sender = format!("{uid}.{number}");
        let before = taken;
        gate.admit(&sender, call());
        gate.identified(&sender, Some(uid));
        while gate.admit(&sender, call()) == Admission::Queued {
            taken += 1;
        }
        if taken == before {
            break;
        }
    }
    gate.lock().users.get(&Some(uid)).map_or(0, |user| user.bytes)
}

#[test]
fn bytes_are_bounded_over_all_senders_and_something_is_left_for_the_next_user() {
    const ALL: usize = 64 << 10;
    let gate = gate(Limits { bytes: 4096, bytes_in_all: ALL, ..Limits::default() });
    let first = fill(&gate, 1);
    // One call of theirs may have come in while nobody knew whose it was.
    assert!(first > ALL / 2 - 2048 && first < ALL / 2 + 1024, "{first}");
    let second = fill(&gate, 2);
    assert!(second > ALL / 4 - 2048 && second < ALL / 4 + 1024, "{second}");
    let third = fill(&gate, 3);
    assert!(third > ALL / 8 - 2048 && third < ALL / 8 + 1024, "{third}");
    assert!(gate.lock().bytes <= ALL);
}

#[test]
fn senders_nobody_knows_yet_are_one_user() {
    const ALL: usize = 64 << 10;
    let gate = gate(Limits { bytes_in_all: ALL, ..Limits::default() });
    let refused = (0..1000).find(|number| matches!(gate.admit(&format!(":{number}"), call()), Admission::Refused(_)));
    assert!(refused.is_some());
    assert!(gate.lock().bytes <= ALL / 2);
    // Whose user is found counts for it from then on, and nobody more for the others.
    gate.identified(":0", Some(7));
    assert_eq!(gate.admit(":1001", call()), Admission::Stranger);
    assert!(gate.lock().users[&Some(7)].bytes > 0);
}

fn unread(of_sender: usize, in_all: usize) -> Limits {
    let unread = Unread { of_sender, of_stranger: of_sender, in_all, ..Unread::default() };
    Limits { unread: Some(unread), waiting: 1, ..Limits::default() }
}

fn kept(bytes: usize, descriptors: usize) -> Backlog {
    Backlog { bytes, descriptors }
}

#[test]
fn descriptors_that_are_brought_are_bounded_of_senders_of_users_and_in_all() {
    let gate = gate(Limits::default());
    let Descriptors { of_sender, of_user, in_all } = Descriptors::BROUGHT;
    let known = |sender: &str, uid| {
        gate.admit(sender, call());
        gate.identified(sender, Some(uid));
    };
    assert!(gate.brings("a", of_sender + 1).is_none());
    let mut held = gate.brings("a", of_sender).unwrap();
    assert!(gate.brings("a", 1).is_none(), "these are a's");
    held.extend(gate.brings("b", of_user - of_sender).unwrap());
    assert!(gate.brings("c", 1).is_none(), "whose user is not known is of one user");
    known("a", 1);
    held.extend(gate.brings("c", of_sender).unwrap());
    known("d", 1);
    held.extend(gate.brings("d", of_user - of_sender).unwrap());
    assert!(gate.brings("d", 1).is_none());
    for uid in 2..6 {
        known(&uid.to_string(), uid);
        held.extend((0..of_sender).map_while(|_| gate.brings(&uid.to_string(), 1)).flatten());
    }
    assert!(held.len() > in_all / 2 && held.len() < in_all, "{}", held.len());
    known("e", 50);
    assert_eq!(gate.brings("e", 1).map(|places| places.len()), Some(1), "others leave some");
    // Who has left still has them, until they are closed.
    gate.left("d");
    assert_eq!(gate.lock().brought.len(), held.len());
    held.clear();
    assert!(gate.lock().brought.is_empty() && gate.brings("d", of_sender).is_some());
}

#[test]
fn who_leaves_with_calls_that_wait_gives_their_places_back() {
    let gate = gate(Limits::default());
    let brings = |sender: &str| {
        let places = gate.brings(sender, 2).unwrap().into_iter().map(Arc::new).collect();
        let brought = Some(Brought { files: Vec::new(), places });
        gate.admit(sender, Incoming { message: call(), brought });
    };
    ["a", "b", "c"].into_iter().for_each(brings);
    assert_eq!(gate.lock().brought.len(), 6);
    gate.left("a");
    assert_eq!(gate.lock().brought.len(), 4);
    drop(gate.identified("b", None));
    assert_eq!(gate.lock().brought.len(), 2);
    gate.all_left();
    assert!(gate.lock().brought.is_empty());
}

/// So many descriptors, one by one, until a sender gets no more.
fn sent_descriptors(gate: &Gate, sender: &str, uid: u32) -> usize {
    gate.meet(sender);
    gate.identified(sender, Some(uid));
    (0..100).find(|_| !gate.takes_descriptors(sender, 1)).unwrap()
}

#[test]
fn descriptors_that_are_unread_are_bounded_of_senders_of_users_and_in_all() {
    let gate = gate(unread(1 << 20, 4 << 20));
    let Descriptors { of_sender, of_user, in_all } = Descriptors::UNREAD;
    assert_eq!(sent_descriptors(&gate, "a", 1), of_sender);
    assert!(gate.is_to_be_watched("a") && !gate.is_to_be_watched("a"), "it is looked at once");
    assert!(!gate.is_held("a"), "what brings no descriptor goes on");
    assert_eq!((sent_descriptors(&gate, "b", 1), sent_descriptors(&gate, "c", 1)), (of_user - of_sender, 0));
    let others: usize = (2..40).map(|uid| sent_descriptors(&gate, &uid.to_string(), uid)).sum();
    assert!(others + of_user > in_all / 2 && others + of_user <= in_all, "{others}");
    assert!(gate.lock().descriptors <= in_all);
}

#[test]
fn who_has_read_its_descriptors_gets_more_and_so_does_its_user() {
    let gate = gate(unread(1 << 20, 4 << 20));
    assert_eq!((sent_descriptors(&gate, "a", 1), sent_descriptors(&gate, "b", 1)), (4, 4));
    assert!(gate.is_to_be_watched("a"));
    assert_eq!(gate.looks_at("a"), 4);
    assert!(!gate.drained("a", kept(0, 3)), "it is looked at until it has read them all");
    assert_eq!((sent_descriptors(&gate, "c", 1), sent_descriptors(&gate, "a", 1)), (1, 0));
    assert_eq!(gate.looks_at("a"), 3);
    assert!(gate.drained("a", Backlog::default()));
    // One that is sent while the bus is asked is not forgotten.
    gate.looks_at("a");
    assert!(gate.takes_descriptors("a", 1));
    assert!(!gate.drained("a", Backlog::default()));
    assert_eq!(gate.looks_at("a"), 1);
    assert!(gate.drained("a", Backlog::default()) && !gate.is_to_be_watched("a"));
    assert_eq!(gate.lock().descriptors, 5, "of the others");
}

#[test]
fn who_does_not_read_waits() {
    let gate = gate(unread(2000, 1 << 20));
    assert_eq!(gate.meet("a"), Standing::Free);
    assert!(!gate.answered("a", 1000));
    assert!(gate.answered("a", 1000));
    assert_eq!(gate.meet("a"), Standing::Held);
    assert!(gate.is_held("a") && gate.unread("a") > 2000);
    assert!(!gate.answered("a", 1000), "it is looked at once");
    gate.admit("a", call());
    gate.identified("a", Some(1));
    assert!(gate.next().is_none());
    assert_eq!(gate.admit("a", call()), Admission::Dropped);
    assert!(!gate.drained("a", kept(1500, 0)) && gate.drained("a", kept(100, 0)));
    assert!(gate.next().is_some() && !gate.is_held("a"));
}

#[test]
fn what_is_unread_is_bounded_over_all_connections_of_a_user() {
    const ALL: usize = 1 << 20;
    let gate = gate(unread(100 << 10, ALL));
    let answer = |sender: &str, uid| {
        gate.meet(sender);
        gate.identified(sender, Some(uid));
        gate.answered(sender, 50 << 10)
    };
    let held = (0..100).find(|number| answer(&format!("a{number}"), 1));
    assert!(held.is_some_and(|number| number <= 11), "{held:?}");
    assert!(!answer("b", 2), "another user's senders go on");
    // The connections that were not held are, with their next answer.
    assert!(answer("a0", 1));
    assert!(!gate.drained("a0", kept(51 << 10, 0)), "it has read nothing");
    for number in (0..=held.unwrap()).rev() {
        gate.drained(&format!("a{number}"), Backlog::default());
    }
    assert!(!gate.is_held("a0") && gate.lock().unread < 60 << 10);
}

#[test]
fn who_is_not_known_is_asked_for_before_it_has_much() {
    let mut limits = unread(1 << 20, 8 << 20);
    limits.unread.as_mut().unwrap().of_stranger = 4096;
    let gate = gate(limits);
    gate.meet("a");
    assert!(gate.answered("a", 5000) && gate.is_to_be_asked_for("a") && !gate.is_to_be_asked_for("a"));
    gate.identified("a", Some(1));
    assert!(gate.drained("a", kept(5000, 0)));
    assert!(!gate.answered("a", 5000));
}
