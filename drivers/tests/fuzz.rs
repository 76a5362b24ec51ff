//! The targets of `tests/fuzz`, run for a while as plain tests: the kept corpus, and documents made from it at random, the
//! same ones each time. `FUZZ_RUNS` in the environment asks for more of them, `FUZZ_FROM` for others.

#[path = "../../tests/fuzz/argv.rs"]
mod argv;
#[path = "../../tests/fuzz/dice.rs"]
mod dice;
#[path = "../../tests/fuzz/documents.rs"]
mod documents;
#[path = "../../tests/fuzz/xml.rs"]
mod xml;

use dice::Dice;
use documents::{Maker, texts};
use std::path::{Path, PathBuf};
use virt_drivers::qemu::capabilities::Capabilities;
use virt_model::domain::{DomainDef, vocabulary};

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests")
}

fn host() -> Capabilities {
    argv::host(&tests().join("data/qemu"))
}

/// A number from the environment.
fn said(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Says which of the runs failed.
struct Run(u64);

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to do it again: FUZZ_FROM={} FUZZ_RUNS=1", self.0);
        }
    }
}

/// Runs `what` so many times, or as often as the environment says; each run has dice of its own.
fn runs(times: u64, mut what: impl FnMut(&mut Dice)) {
    let from = said("FUZZ_FROM", 0);
    for number in from..from + said("FUZZ_RUNS", times) {
        let _run = Run(number);
        what(&mut Dice::new(number));
    }
}

#[test]
fn the_kept_corpus_holds() {
    let host = host();
    let all = [texts(&tests().join("data")), texts(&tests().join("fuzz/corpus"))].concat();
    assert!(all.len() > 60, "only {} documents", all.len());
    for (path, text) in all {
        eprintln!("{}", path.display());
        xml::holds(&text);
        argv::holds(&text, &host);
    }
}

#[test]
fn changed_documents_hold() {
    let (maker, host) = (Maker::new(&tests().join("data")), host());
    let mut accepted = 0;
    runs(400, |dice| {
        let text = maker.variant(dice);
        accepted += u64::from(DomainDef::parse(&text).is_ok());
        xml::holds(&text);
        argv::holds(&text, &host);
    });
    // Most of what is refused is refused for one reason; what is behind that needs documents that are not.
    assert!(accepted > 50 || said("FUZZ_RUNS", 400) < 400, "only {accepted} were accepted");
}

#[test]
fn made_up_documents_hold() {
    let (maker, host) = (Maker::new(&tests().join("data")), host());
    runs(400, |dice| {
        let text = maker.made_up(dice).write();
        xml::holds(&text);
        argv::holds(&text, &host);
    });
}

/// What libFuzzer takes words from. With `UPDATE=1` in the environment it is written anew.
#[test]
fn the_dictionary_is_that_of_the_format() {
    let names = vocabulary().into_iter().flat_map(|(path, attributes)| {
        let element = path.rsplit('/').next().unwrap_or_default().to_owned();
        attributes.into_iter().map(|name| format!(" {name}='")).chain([format!("<{element}>"), format!("</{element}>")])
    });
    let words: std::collections::BTreeSet<String> = names.filter(|word| !word.contains("<>")).collect();
    let text: String = words.iter().map(|word| format!("\"{word}\"\n")).collect();
    let file = tests().join("fuzz/dictionary");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert!(std::fs::read_to_string(&file).unwrap_or_default() == text, "UPDATE=1 writes it anew");
}
