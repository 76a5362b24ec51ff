//! System calls that nothing behind the wall may make. QEMU's own sandbox does the same for a part of them, later, and not
//! for its companions.

use super::{Maker, Wall};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use std::collections::BTreeMap;
use std::io;

/// Programs do without it if the kernel has not got it.
const URING: [i64; 3] = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
/// Other processes, keys, programs in the kernel, the host itself.
const FORBIDDEN: [i64; 34] = [
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_bpf,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_memfd_secret,
    libc::SYS_fanotify_init,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_vhangup,
    libc::SYS_personality,
    libc::SYS_lookup_dcookie,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_vmsplice,
];
/// Namespaces, what is mounted, and files that were not opened there.
const NAMESPACES: [i64; 16] = [
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_open_by_handle_at,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];
/// Flags of `clone` that make a namespace.
const NEW: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
/// Kinds of sockets where there is no network, and where there is.
const LOCAL: [i32; 1] = [libc::AF_UNIX];
const NETWORK: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// The kernel's words for an instruction that answers, and for one that goes on that many instructions later.
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Holds the calling thread, and what it makes, to what the wall allows. It gains no privileges any more.
pub fn filter(wall: &Wall) -> io::Result<()> {
    let programs = rules(wall)
        .and_then(|rules| rules.into_iter().map(|(rules, error)| program(rules, error)).collect::<Result<Vec<_>, _>>());
    apply_filter(&joined(programs.map_err(io::Error::other)?)).map_err(io::Error::other)
}

/// One program of several, for the kernel translates each that it is given: what one allows is asked of the next. A call that
/// one refuses is refused.
fn joined(programs: Vec<BpfProgram>) -> BpfProgram {
    let mut joined = BpfProgram::new();
    for mut next in programs.into_iter().rev() {
        let end = next.len();
        for (at, instruction) in next.iter_mut().enumerate().filter(|_| !joined.is_empty()) {
            if (instruction.code, instruction.k) == (RETURN, libc::SECCOMP_RET_ALLOW) {
                (instruction.code, instruction.k) = (JUMP, (end - at - 1) as u32);
            }
        }
        next.append(&mut joined);
        joined = next;
    }
    joined
}

fn program(rules: Rules, error: i32) -> Result<BpfProgram, seccompiler::BackendError> {
    let arch = std::env::consts::ARCH.try_into()?;
    let answer = SeccompAction::Errno(error as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, answer, arch)?.try_into()
}

/// What is refused, with each error.
fn rules(wall: &Wall) -> Result<[(Rules, i32); 3], seccompiler::BackendError> {
    let always = |calls: &[i64]| calls.iter().map(|call| (*call, Vec::new())).collect::<Rules>();
    let uring: &[i64] = if wall.uring { &[] } else { &URING };
    let (mut unknown, mut forbidden, mut no_family) = (always(uring), always(&FORBIDDEN), Rules::new());
    if !wall.shuts_itself_in {
        forbidden.extend(always(&NAMESPACES));
        // Its flags are in memory, where no filter looks; without it libc makes threads by clone.
        unknown.insert(libc::SYS_clone3, Vec::new());
        let flag = |flag: &i32| {
            let bit = u64::from(flag.cast_unsigned());
            SeccompRule::new(vec![condition(SeccompCmpOp::MaskedEq(bit), bit)?])
        };
        forbidden.insert(libc::SYS_clone, NEW.iter().map(flag).collect::<Result<_, _>>()?);
        let families = if wall.network || wall.maker == Maker::Nobody { &NETWORK[..] } else { &LOCAL[..] };
        no_family.insert(libc::SYS_socket, other_sockets(families, wall.news_of_devices)?);
    }
    Ok([(unknown, libc::ENOSYS), (forbidden, libc::EPERM), (no_family, libc::EAFNOSUPPORT)])
}

/// Sockets that are of none of these families. `news`: those by which the kernel tells of devices are none of them.
fn other_sockets(families: &[i32], news: bool) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let is_not = |family: &i32| condition(SeccompCmpOp::Ne, u64::from(family.cast_unsigned()));
    let others = families.iter().map(is_not).collect::<Result<Vec<_>, _>>()?;
    if !news || families.contains(&libc::AF_NETLINK) {
        return Ok(vec![SeccompRule::new(others)?]);
    }
    let telling = u64::from(libc::NETLINK_KOBJECT_UEVENT.cast_unsigned());
    let of_another = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, telling)?;
    let no_netlink = [others.clone(), vec![is_not(&libc::AF_NETLINK)?]].concat();
    Ok(vec![SeccompRule::new(no_netlink)?, SeccompRule::new([others, vec![of_another]].concat())?])
}

/// On the first argument.
fn condition(what: SeccompCmpOp, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(0, SeccompCmpArgLen::Dword, what, value)
}
