//! Documents that are given: validated, compared, and made the configuration of a domain.

use crate::world::{World, xml};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use virt_model::domain::Form;
use virt_service::authz::Action;
use virt_service::error::Error;
use virt_service::{Affect, StartOptions};

#[tokio::test]
async fn documents_are_compared_completed_and_not_held_against_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let compare = async |source: &str, target: &str| {
        let found = world.service.compare(&world.alice(), source, target).await?;
        Ok::<_, Error>(found.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    // Neither says its uuid or its MAC address, and no driver serves the type.
    let vax = "<domain type='vax'><name>v</name><memory>1024</memory><currentMemory>512</currentMemory>\
               <devices><interface type='user'/></devices></domain>";
    assert_eq!(compare(vax, vax).await.unwrap(), Vec::<String>::new());
    let other = vax.replace("'user'/>", "'user'><mtu size='9000'/></interface>").replace("512", "1024");
    let found = compare(vax, &other).await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].ends_with("]/mtu/size: nothing → '9000'"), "{found:?}");
    let said = xml("web", "<vcpu>1</vcpu>");
    assert_eq!(compare(&said, &xml("web", "")).await.unwrap(), Vec::<String>::new(), "the default spelled out");
    let wrong = compare("<domain/>", vax).await.unwrap_err();
    assert!(
        matches!(wrong, Error::ConfigInvalid(_)) && wrong.to_string().contains("in the source document"),
        "{wrong}"
    );
    assert!(world.notary.asked.lock().unwrap().iter().all(|(action, subject)| {
        *action == Action::Read && subject.detail("domain_uuid").is_empty() && subject.detail("domain_name").is_empty()
    }));
    world.notary.refuses.store(true, Ordering::Relaxed);
    assert!(matches!(compare(vax, vax).await, Err(Error::AccessDenied(_))));
}

#[tokio::test]
async fn what_a_document_would_meet_is_told_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    world.define("web").await;
    let findings = world.service.validate(&world.alice(), &xml("web", "<nonsense/><vcpu>0</vcpu>")).await.unwrap();
    assert!(findings.len() >= 2, "{findings:?}");
    let findings = world.service.validate(&world.alice(), &xml("web", "")).await.unwrap();
    assert_eq!(findings.iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["/name"], "the name is taken");
    let findings = world.service.validate(&world.alice(), "<domain type='vax'><name>v</name></domain>").await.unwrap();
    assert!(!findings.is_empty());
    assert_eq!(world.service.validate(&world.alice(), &xml("new", "")).await.unwrap(), []);
}

/// The map of names and the state of a domain are both locked here, by two callers at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_document_that_does_not_fit_and_an_end_do_not_lock_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let uuid = uuid::Uuid::new_v4();
    let (own, other) = (xml("brief", &format!("<uuid>{uuid}</uuid>")), xml("other", &format!("<uuid>{uuid}</uuid>")));
    let stop = Arc::new(AtomicBool::new(false));
    for _ in 0..2 {
        let (service, alice, other, stop) = (world.service.clone(), world.alice(), other.clone(), stop.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let _ = service.validate(&alice, &other).await;
            }
        });
    }
    let lives = async {
        for _ in 0..50 {
            let (domain, ticket) = world.service.create(&world.alice(), &own, StartOptions::default()).await.unwrap();
            ticket.done().await.unwrap();
            domain.destroy(&world.alice(), false).await.unwrap();
        }
    };
    let done = tokio::time::timeout(std::time::Duration::from_secs(60), lives).await;
    stop.store(true, Ordering::Relaxed);
    done.expect("nobody waits for ever");
}

#[tokio::test]
async fn live_and_stored_configuration_are_changed_apart_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let alice = world.alice();
    let (live, config) = (Affect { live: true, config: false }, Affect { live: false, config: true });
    assert!(matches!(domain.set_title(&alice, "x", live).await, Err(Error::OperationInvalid(_))), "it is off");
    world.start(&domain).await.unwrap();
    assert!(!domain.facts().config_changed());
    domain.set_title(&alice, "next time", config).await.unwrap();
    assert_eq!((&*domain.facts().config.title, domain.facts().config_changed()), ("", true));
    domain.set_title(&alice, "now", live).await.unwrap();
    assert_eq!(&*domain.facts().config.title, "now");
    domain.destroy(&alice, false).await.unwrap();
    assert_eq!((&*domain.facts().config.title, domain.facts().config_changed()), ("next time", false));
    assert!(matches!(domain.set_title(&alice, "two\nlines", config).await, Err(Error::InvalidArgument(_))));
    let long = "é".repeat(4000);
    assert!(matches!(domain.set_description(&alice, &long, config).await, Err(Error::InvalidArgument(_))));
    let document = xml("long", &format!("<description>{long}</description>"));
    let domain = world.service.define(&alice, &document, false).await.expect("a document may have it");
    assert_eq!(domain.facts().config.description.len(), 4096);
    assert!(domain.xml(&alice, Form::default()).await.unwrap().contains(&long));
}

#[tokio::test]
async fn a_change_of_both_configurations_is_made_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    world.start(&domain).await.unwrap();
    std::fs::rename(folder.path().join("run/status"), folder.path().join("run/elsewhere")).unwrap();
    assert!(domain.set_title(&world.alice(), "new", Affect::default()).await.is_err(), "the live one cannot be kept");
    assert_eq!(&*domain.facts().config.title, "");
    let stored = std::fs::read_to_string(folder.path().join(format!("state/domains/{}.xml", domain.uuid()))).unwrap();
    assert!(!stored.contains("new"), "{stored}");
}

#[tokio::test]
async fn names_and_uuids_belong_together() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let again = world.service.define(&world.alice(), &xml("web", ""), false).await;
    assert!(matches!(again, Err(Error::DomainExists(_))), "the same name with another uuid");
    let uuid = format!("<uuid>{}</uuid>", domain.uuid());
    let other = world.service.define(&world.alice(), &xml("db", &uuid), false).await;
    assert!(matches!(other, Err(Error::DomainExists(_))), "the same uuid with another name");
    let update = world.service.define(&world.alice(), &xml("web", &format!("{uuid}<title>T</title>")), false).await;
    assert_eq!(update.expect("an update").facts().config.title.as_ref(), "T");
}

#[tokio::test]
async fn what_runs_is_shown_as_it_is_by_now() {
    let folder = tempfile::tempdir().unwrap();
    let world = World::open(folder.path()).await;
    let domain = world.define("web").await;
    let alice = world.alice();
    let shown = async |form: Form| domain.xml(&alice, form).await.unwrap();
    let inactive = Form { inactive: true, ..Form::default() };
    let both = Affect { live: true, config: true };
    for title in ["The shop", "The store"] {
        world.start(&domain).await.unwrap();
        let before = shown(Form::default()).await;
        assert!(before.contains(" id='") && !shown(inactive).await.contains(" id='"), "{before}");
        assert_eq!(before, shown(Form::default()).await);
        domain.set_title(&alice, title, both).await.unwrap();
        let after = shown(Form::default()).await;
        assert!(!before.contains(title) && after.contains(title), "{after}");
        domain.destroy(&alice, false).await.unwrap();
        assert_eq!(shown(Form::default()).await, shown(inactive).await);
    }
}
