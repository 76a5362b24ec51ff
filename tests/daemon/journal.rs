//! What the journal is told, read from a socket that stands in for systemd's.

use crate::common::client::Client;
use crate::common::{Daemon, PATIENCE, root};
use std::collections::HashMap;
use std::os::unix::net::UnixDatagram;

/// A message in the journal's own format: `KEY=value`, or a key alone, the value's length in eight bytes, and the value.
fn parse(mut message: &[u8]) -> HashMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    let mut fields = HashMap::new();
    while let Some(end) = message.iter().position(|byte| *byte == b'\n') {
        let (line, rest) = (&message[..end], &message[end + 1..]);
        message = match line.iter().position(|byte| *byte == b'=') {
            Some(at) => {
                fields.insert(text(&line[..at]), text(&line[at + 1..]));
                rest
            }
            None => {
                let (length, rest) = rest.split_at(8);
                let length = usize::try_from(u64::from_le_bytes(length.try_into().expect("eight"))).expect("a length");
                fields.insert(text(line), text(&rest[..length]));
                &rest[length + 1..]
            }
        };
    }
    fields
}

/// The next message of this kind.
fn next(journal: &UnixDatagram, id: &str) -> HashMap<String, String> {
    journal.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = journal.recv(&mut buffer).expect("the journal is told");
        let fields = parse(&buffer[..length]);
        if fields.get("MESSAGE_ID").is_some_and(|kind| kind == id) {
            return fields;
        }
    }
}

fn id_of(kind: &str) -> &'static str {
    virtd::log::MESSAGE_IDS.iter().find(|(target, _)| *target == kind).expect("a kind").1
}

/// A message without the time that it took.
fn sentence(fields: &HashMap<String, String>) -> String {
    let (took, text) = (&fields["VIRT_DOMAIN_DURATION_MS"], &fields["MESSAGE"]);
    text.replace(&format!(" in {took} ms"), " in N ms")
}

#[tokio::test]
async fn the_journal_is_told_sentences_with_fields() {
    if !root() {
        return;
    }
    let Some(mut daemon) = Daemon::session_bus() else { return };
    let journal = daemon.journal();
    daemon.start_virtd().await;
    let client = Client { connection: daemon.connect().await };
    let web = "<domain type='test'><name>web</name><memory>65536</memory><os><type>hvm</type></os></domain>";
    let domain = client.define(web).await.expect("defined");
    let uid = nix::unistd::geteuid();

    let done = next(&journal, id_of(virt_service::log::DONE));
    assert_eq!(sentence(&done), format!("domain \"web\": define by uid {uid}: done in N ms"));
    assert_eq!(done["VIRT_DOMAIN_NAME"], "web");
    assert_eq!(done["VIRT_DOMAIN_UUID"], domain.property::<String>("UUID").await);
    assert_eq!(done["VIRT_DOMAIN_ACTION"], "define");
    assert_eq!(done["VIRT_DOMAIN_CALLER_UID"], uid.to_string());

    domain.bare("Suspend").await.expect_err("it does not run");
    let failed = next(&journal, id_of(virt_service::log::FAILED));
    let text = sentence(&failed);
    assert!(text.starts_with(&format!("domain \"web\": suspend by uid {uid}: failed in N ms: ")), "{text}");

    assert!(client.define("<domain/>").await.is_err(), "there is nothing in it");
    let failed = next(&journal, id_of(virt_service::log::FAILED));
    let text = sentence(&failed);
    assert!(text.starts_with(&format!("define by uid {uid}: failed in N ms: ")), "{text}");
    assert_eq!(failed.get("VIRT_DOMAIN_NAME"), None);

    domain.run("Start").await.expect("started");
    domain.run("Destroy").await.expect("destroyed");
    let guest = next(&journal, id_of(virt_service::log::GUEST));
    assert_eq!(guest["MESSAGE"], "domain \"web\": stopped (destroyed)");
    assert_eq!((&*guest["VIRT_DOMAIN_EVENT"], &*guest["VIRT_DOMAIN_DETAIL"]), ("stopped", "destroyed"));
    assert_eq!(guest["VIRT_DOMAIN_NAME"], "web");
}
