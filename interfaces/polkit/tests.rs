//! The authority against a polkit of our own making, on a paused clock.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Answers what it is told to, when it is let.
struct Fake {
    verdict: Mutex<Result<Verdict, String>>,
    prompted: Mutex<Verdict>,
    asked: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    cancelled: AtomicUsize,
    gate: Semaphore,
    people: Semaphore,
}

const YES: Verdict = Verdict { yes: true, challenge: false, temporary: false };
const NO: Verdict = Verdict { yes: false, challenge: false, temporary: false };
const CHALLENGE: Verdict = Verdict { yes: false, challenge: true, temporary: false };

#[async_trait]
impl Ask for Fake {
    async fn ask(&self, question: &Question) -> Result<Verdict, String> {
        self.asked.fetch_add(1, SeqCst);
        let now = self.at_once.fetch_add(1, SeqCst) + 1;
        self.most_at_once.fetch_max(now, SeqCst);
        let gate = if question.prompt { &self.people } else { &self.gate };
        gate.acquire().await.map_err(|e| e.to_string())?.forget();
        self.at_once.fetch_sub(1, SeqCst);
        if question.prompt { Ok(*lock(&self.prompted)) } else { lock(&self.verdict).clone() }
    }

    async fn cancel(&self, _: &Question) {
        self.cancelled.fetch_add(1, SeqCst);
    }
}

fn polkit(verdict: Verdict, answers: usize) -> (Arc<Fake>, Arc<Polkit>) {
    let fake = Arc::new(Fake {
        verdict: Mutex::new(Ok(verdict)),
        prompted: Mutex::new(YES),
        asked: AtomicUsize::new(0),
        at_once: AtomicUsize::new(0),
        most_at_once: AtomicUsize::new(0),
        cancelled: AtomicUsize::new(0),
        gate: Semaphore::new(answers),
        people: Semaphore::new(0),
    });
    (fake.clone(), Arc::new(Polkit::new(fake)))
}

fn caller(name: &str, uid: u32) -> Caller {
    Caller { bus_name: Some(name.into()), uid, interactive: false, departed: CancellationToken::new() }
}

fn machine(name: &str) -> Subject {
    Subject::default().with("domain_name", name)
}

#[tokio::test(start_paused = true)]
async fn root_is_not_asked() {
    let (fake, polkit) = polkit(NO, 0);
    polkit.check(&caller(":1.1", 0), Action::Delete, &machine("web")).await.unwrap();
    assert_eq!(polkit.can(&caller(":1.1", 0), Action::Delete, &machine("web")).await, Answer::Yes);
    assert_eq!(fake.asked.load(SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn a_yes_is_remembered_per_caller_action_and_machine_for_a_while() {
    let (fake, polkit) = polkit(YES, 100);
    let alice = caller(":1.1", 1000);
    for _ in 0..3 {
        polkit.check(&alice, Action::Start, &machine("web")).await.unwrap();
    }
    assert_eq!(fake.asked.load(SeqCst), 1);
    polkit.check(&alice, Action::Start, &machine("db")).await.unwrap();
    polkit.check(&alice, Action::Stop, &machine("web")).await.unwrap();
    polkit.check(&caller(":1.2", 1000), Action::Start, &machine("web")).await.unwrap();
    assert_eq!(fake.asked.load(SeqCst), 4);
    tokio::time::advance(Duration::from_secs(6)).await;
    polkit.check(&alice, Action::Start, &machine("web")).await.unwrap();
    assert_eq!(fake.asked.load(SeqCst), 5);
}

#[tokio::test(start_paused = true)]
async fn a_no_and_what_polkit_keeps_are_asked_again() {
    let (fake, polkit) = polkit(NO, 100);
    let alice = caller(":1.1", 1000);
    for _ in 0..2 {
        let denied = polkit.check(&alice, Action::Stop, &machine("web")).await.unwrap_err();
        assert!(matches!(&denied, Error::AccessDenied(text) if text.contains("org.virt.domain.stop")), "{denied}");
    }
    *lock(&fake.verdict) = Ok(Verdict { temporary: true, ..YES });
    for _ in 0..2 {
        polkit.check(&alice, Action::Start, &machine("web")).await.unwrap();
    }
    assert_eq!(fake.asked.load(SeqCst), 4);
}

#[tokio::test(start_paused = true)]
async fn changed_rules_forget_what_was_and_what_is_being_asked() {
    let (fake, polkit) = polkit(YES, 1);
    let alice = caller(":1.1", 1000);
    polkit.check(&alice, Action::Start, &machine("web")).await.unwrap();
    polkit.forget();
    let asking = {
        let (polkit, alice) = (polkit.clone(), alice.clone());
        tokio::spawn(async move { polkit.check(&alice, Action::Start, &machine("web")).await })
    };
    until(|| fake.asked.load(SeqCst) == 2).await;
    polkit.forget();
    fake.gate.add_permits(2);
    asking.await.unwrap().unwrap();
    polkit.check(&alice, Action::Start, &machine("web")).await.unwrap();
    assert_eq!(fake.asked.load(SeqCst), 3, "the answer was to a question from before the change");
}

#[tokio::test(start_paused = true)]
async fn the_same_question_is_asked_once_and_others_are_bounded() {
    let (fake, polkit) = polkit(YES, 0);
    let ask = |sender: String, name: String| {
        let polkit = polkit.clone();
        tokio::spawn(async move { polkit.check(&caller(&sender, 1000), Action::Start, &machine(&name)).await })
    };
    let same: Vec<_> = (0..10).map(|_| ask(":1.1".into(), "web".into())).collect();
    let others: Vec<_> = (0..200).map(|n| ask(format!(":1.{}", n % 7), format!("vm{n}"))).collect();
    until(|| fake.asked.load(SeqCst) == AT_ONCE).await;
    fake.gate.add_permits(1000);
    for task in same.into_iter().chain(others) {
        task.await.unwrap().unwrap();
    }
    assert_eq!(fake.asked.load(SeqCst), 201);
    assert_eq!(fake.most_at_once.load(SeqCst), AT_ONCE);
    assert!(lock(&polkit.inner.asked).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_person_is_asked_only_if_the_call_allows_it() {
    let (fake, polkit) = polkit(CHALLENGE, 100);
    let mut alice = caller(":1.1", 1000);
    let refused = polkit.check(&alice, Action::Start, &machine("web")).await.unwrap_err();
    assert!(matches!(refused, Error::InteractionRequired(_)), "{refused}");
    assert_eq!(polkit.can(&alice, Action::Start, &machine("web")).await, Answer::Challenge);
    alice.interactive = true;
    fake.people.add_permits(2);
    polkit.check(&alice, Action::Start, &machine("web")).await.unwrap();
    *lock(&fake.prompted) = NO;
    let wrong = polkit.check(&alice, Action::Stop, &machine("web")).await.unwrap_err();
    assert!(matches!(wrong, Error::AccessDenied(_)), "{wrong}");
    *lock(&fake.prompted) = CHALLENGE;
    fake.people.add_permits(1);
    let alone = polkit.check(&alice, Action::Delete, &machine("web")).await.unwrap_err();
    assert!(matches!(&alone, Error::InteractionRequired(text) if text.contains("no authentication agent")), "{alone}");
}

#[tokio::test(start_paused = true)]
async fn a_prompt_ends_with_its_caller_and_holds_no_turn() {
    let (fake, polkit) = polkit(CHALLENGE, 1);
    let mut alice = caller(":1.1", 1000);
    alice.interactive = true;
    let departed = alice.departed.clone();
    let asking = {
        let polkit = polkit.clone();
        tokio::spawn(async move { polkit.check(&alice, Action::Start, &machine("web")).await })
    };
    until(|| fake.asked.load(SeqCst) == 2).await;
    departed.cancel();
    assert!(matches!(asking.await.unwrap(), Err(Error::AccessDenied(_))));
    assert_eq!(fake.cancelled.load(SeqCst), 1);
    assert!(lock(&polkit.inner.prompts).is_empty());
}

#[tokio::test(start_paused = true)]
async fn prompts_of_one_user_are_bounded() {
    let (fake, polkit) = polkit(CHALLENGE, 100);
    let ask = |n: usize| {
        let polkit = polkit.clone();
        let caller = Caller { interactive: true, ..caller(&format!(":1.{n}"), 1000) };
        tokio::spawn(async move { polkit.check(&caller, Action::Start, &machine("web")).await })
    };
    for n in 0..PROMPTS.1 {
        drop(ask(n));
    }
    until(|| fake.asked.load(SeqCst) == 2 * PROMPTS.1).await;
    let refused = ask(99).await.unwrap().unwrap_err();
    assert!(matches!(refused, Error::LimitsExceeded(_)), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn not_knowing_is_no() {
    let (fake, polkit) = polkit(YES, 100);
    *lock(&fake.verdict) = Err("it is not there".into());
    let alice = caller(":1.1", 1000);
    let denied = polkit.check(&alice, Action::Start, &machine("web")).await.unwrap_err();
    assert!(matches!(&denied, Error::AccessDenied(text) if text.contains("it is not there")), "{denied}");
    assert_eq!(polkit.can(&alice, Action::Start, &machine("web")).await, Answer::No);
    let nameless = Caller { bus_name: None, ..alice };
    assert!(polkit.check(&nameless, Action::Start, &machine("web")).await.is_err());
}

/// Lets other tasks run until `seen`.
async fn until(seen: impl Fn() -> bool) {
    for _ in 0..100_000 {
        if seen() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("it never came to that");
}
