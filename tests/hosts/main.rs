//! What every host of another hypervisor is held to: one list of cases over the bus, run on each bed. A bed is a host, and somebody else
//! who has to do with it; virtd is a service in this process, and its bus a socket pair, so that nothing but the host is waited for.

mod away;
mod beds;
mod foreign;
mod house;
mod names;
mod table;
mod verbs;

use beds::Bed;

/// A case: what it shows, and the words that a host must have for it.
pub struct Case {
    /// What it shows.
    pub what: &'static str,
    /// The words that a host must have for it.
    pub needs: &'static [&'static str],
}

impl Case {
    /// Whether it can be run on that bed.
    pub fn fits(&self, bed: &dyn Bed) -> bool {
        self.needs.iter().all(|word| bed.words().contains(word))
    }
}

/// Makes a test of each case for each bed, and `CASES` of all.
macro_rules! cases {
    ($($(#[needs($($word:literal),*)])? $module:ident::$name:ident = $what:literal;)+) => {
        /// All of them, in the order in which the table has them.
        pub const CASES: &[Case] = &[$(Case { what: $what, needs: &[$($($word),*)?] }),+];

        /// The host in memory.
        mod on_the_host_in_memory {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $name() {
                    let bed = Box::new(crate::beds::InMemory::default());
                    let case = crate::Case { what: $what, needs: &[$($($word),*)?] };
                    if case.fits(&*bed) {
                        crate::$module::$name(bed).await;
                    }
                }
            )+
        }
    };
}

cases! {
    #[needs("start")] verbs::inventory = "the inventory is the host's: name, uuid, state, configuration; filters know the host";
    #[needs("start", "shutdown", "reboot", "reset", "suspend")]
    verbs::each_verb = "each verb does what it says, and tells its events, in their order, before it returns";
    #[needs("rename", "start")]
    verbs::rename = "a machine is given another name, there and here; a name that is taken is refused, and nothing is told";
    verbs::missing_words = "what the host has no way to do is refused, and `Can` says `na`";
    #[needs("start", "suspend")] verbs::wrong_states = "what the state does not allow is refused, and nothing is told";
    verbs::no_documents = "documents, removal and other changes of the configuration are refused, and change nothing";
    verbs::permission = "polkit is asked for the deed, with the host among the details";
    foreign::definitions = "machines that others make, rename, change and remove are told in the words of the bus";
    #[needs("start", "suspend")]
    foreign::guests = "guests that others start, stop, pause and start anew are told once each";
    #[needs("start")] foreign::during_a_verb = "what others do while a verb is at a machine is told as theirs, and what the verb did once";
    names::twins = "machines of one name or uuid are told apart, on one host, two hosts, and against our own";
    names::many = "a thousand machines are there when virtd is";
    #[needs("start")] names::refused_then_shown = "a machine that has no name left here is a problem, and is shown as it is when one is free";
    names::deceptive = "a name that looks like another is written out";
    away::hangs = "a host that hangs keeps neither reads nor other hosts waiting";
    #[needs("start", "suspend")] away::lost = "of a host that is lost all stays, as unknown, and what is asked of it is refused at once";
    #[needs("start", "suspend")] away::back = "of a host that is back what is otherwise is told";
    #[needs("start")] away::at_start = "a host that is away when virtd starts keeps nobody waiting, and is shown as it was";
    away::nowhere_to_keep = "a host of which nothing can be kept is shown all the same, with a problem";
    #[needs("start")] away::virtd_ends_in_a_verb = "a verb that virtd's end cuts off is what is seen afterwards";
}
