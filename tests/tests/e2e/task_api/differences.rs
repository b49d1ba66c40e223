//! Where Bulkhead's shim answers otherwise than runc's, and why.
//!
//! Only what is always so can be listed. Chance decides under runc, and not here, whether the end of a container without memory is
//! told before or after its reason (the reason comes first), whether a container that is being created is found (it is not, and the
//! answer does not wait), and whether a process that could not be killed any more has stopped (it has). Nor can be listed what never
//! comes: who waits for a container, or for a process in one, that is deleted before its start waits for ever with the shim of runc's
//! age, and is told here. Fields of config.json that are refused stand in docs/oci.md, with their reasons. The numbers of disks in statistics are those of
//! the machine's disks, which may be those of others on the host.

/// The code of runc's shim for whatever runc has printed, which it only passes on.
const VAGUE: &str = "UNKNOWN";

/// The codes that Bulkhead's shim may give instead: one that says what is wrong is no other answer to runc's clients.
const EXACT: &[&str] = &[
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "INTERNAL",
    "INVALID_ARGUMENT",
];

/// One line of what a behaviour sees.
pub struct Difference {
    behaviour: &'static str,
    runc: &'static str,
    bulkhead: &'static str,
    /// Why it differs.
    pub reason: &'static str,
}

/// All of them, but for the codes.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        behaviour: "nobody_there",
        runc: "connect: OK",
        bulkhead: "connect: NOT_FOUND",
        reason: "a containerd that has come back learns by it that nobody waits for this task any more, and has it deleted",
    },
    Difference {
        behaviour: "limits_and_statistics",
        runc: "stats: OK",
        bulkhead: "stats: NOT_FOUND",
        reason: "what a container has used is gone with its control group in the guest, and may be with the machine",
    },
    Difference {
        behaviour: "limits_and_statistics",
        runc: r#"given: ["pids", "cpu", "memory", "rdma", "io", "memory_events"]"#,
        bulkhead: r#"given: ["pids", "cpu", "memory", "io", "memory_events"]"#,
        reason: "a guest has no RDMA devices, and runc's shim gives an empty message where the host has none",
    },
    Difference {
        behaviour: "statistics",
        runc: "interfaces: []",
        bulkhead: r#"interfaces: ["eth0"]"#,
        reason: "runc's shim tells nothing of the network where control groups are of version 2",
    },
    Difference {
        behaviour: "networks",
        runc: "another's: lo 0 0 0 0x9 1024",
        bulkhead: "another's: INVALID_ARGUMENT",
        reason: "a machine has one network, and whoever asks for another one's is told so",
    },
    Difference {
        behaviour: "updates",
        runc: "100663296 8388608 max max 39 30000 100000 30",
        bulkhead: "100663296 8388608 max max 39 30000 50000 30",
        reason: "what is not mentioned stays as it is; runc forgets the period when an update says nothing of processor time",
    },
    Difference {
        behaviour: "wrong_updates",
        runc: "50331648 16777216 33554432 max 20 40000 80000 33",
        bulkhead: "100663296 16777216 33554432 max 20 40000 80000 77",
        reason: "an update that fails changes nothing; runc would undo it too, but has forgotten by then what was before",
    },
    Difference {
        behaviour: "pids_of_processes",
        runc: "init: 1, exec: 1",
        bulkhead: "init: 2, exec: 1",
        reason: "only init and execs have processes on the host; what they start has the number of the init",
    },
    Difference {
        behaviour: "exec_that_cannot_be_made",
        runc: "exec OK, start UNKNOWN, state CREATED, delete OK",
        bulkhead: "exec INVALID_ARGUMENT, start NOT_FOUND, state NOT_FOUND, delete NOT_FOUND",
        reason: "what is wrong with a process and its streams is told when it is added; runc's shim looks at neither before the start",
    },
    Difference {
        behaviour: "exec_that_cannot_be_made",
        runc: "create, start, exec-added directory, exec-added fifo, exit exec-that-cannot-be-made 137, delete 137",
        bulkhead: "create, start, exit exec-that-cannot-be-made 137, delete 137",
        reason: "as above",
    },
    Difference {
        behaviour: "processes_of_the_host",
        runc: r#"own: ["ns/cgroup", "ns/ipc", "ns/mnt", "ns/net", "ns/pid", "ns/uts"]"#,
        bulkhead: r#"own: ["ns/mnt", "ns/net"]"#,
        reason: "the others are in the machine; on the host its processes have a network, and no files",
    },
    Difference {
        behaviour: "processes_of_the_host",
        runc: "its files: true",
        bulkhead: "its files: false",
        reason: "they are in the machine; below /proc/PID/root, where nerdctl cp looks, is nothing, and not the host's files",
    },
    Difference {
        behaviour: "hooks",
        runc: "create OK: prestart hook word id:hooks status:creating createRuntime hook word id:hooks status:creating poststart hook word id:hooks status:created ",
        bulkhead: "create OK: prestart hook word id:hooks status:creating createRuntime hook word id:hooks status:creating ",
        reason: "runtime-spec: poststart hooks run after the program was started, with the status running",
    },
    Difference {
        behaviour: "hooks",
        runc: "start OK: ",
        bulkhead: "start OK: poststart hook word id:hooks status:running ",
        reason: "runtime-spec, as above",
    },
    Difference {
        behaviour: "hooks_that_fail",
        runc: "poststart: prestart, createRuntime, poststart, poststop, then NOT_FOUND, create: UNKNOWN",
        bulkhead: "poststart: start INTERNAL, delete OK, create, start, exit - 137, delete 137, prestart, createRuntime, poststart, poststop, then NOT_FOUND, create: OK",
        reason: "runtime-spec, as above",
    },
    Difference {
        behaviour: "hook_of_the_host_in_the_container",
        runc: "create: OK",
        bulkhead: "create: UNKNOWN",
        reason: "a createContainer hook is a program of the machine, which has no files of the host's but those of the container",
    },
    Difference {
        behaviour: "propagation_of_the_root",
        runc: "shared: private",
        bulkhead: "shared: shared",
        reason: "it is what config.json asks for; runc binds the root from a mount that it has made private",
    },
    Difference {
        behaviour: "propagation_of_the_root",
        runc: "rshared: private",
        bulkhead: "rshared: shared",
        reason: "as above",
    },
    Difference {
        behaviour: "propagation_of_the_root",
        runc: "runbindable: UNKNOWN",
        bulkhead: "runbindable: unbindable",
        reason: "it is what config.json asks for; runc makes the root unbindable and binds it then",
    },
    Difference {
        behaviour: "the_sandbox_itself",
        runc: r#"uses ["pids", "cpu", "memory", "rdma", "io", "memory_events"]: true"#,
        bulkhead: r#"uses ["pids", "cpu", "memory"]: false"#,
        reason: "a pod's sandbox is its machine: no process is in it that could use anything, and none that could be joined, held or limited",
    },
    Difference {
        behaviour: "the_sandbox_itself",
        runc: "exec OK, pause OK, resume OK, update OK",
        bulkhead: "exec UNIMPLEMENTED, pause UNIMPLEMENTED, resume FAILED_PRECONDITION, update UNIMPLEMENTED",
        reason: "as above",
    },
    Difference {
        behaviour: "the_sandbox_itself",
        runc: "create, start, exec-added x, paused, resumed, exit the-sandbox-itself 137, delete 137",
        bulkhead: "create, start, exit the-sandbox-itself 137, delete 137",
        reason: "as above",
    },
    Difference {
        behaviour: "block_devices",
        runc: "hosts: made",
        bulkhead: "hosts: UNIMPLEMENTED",
        reason: "a machine does not have the disks of its host, and its own of the same numbers are others",
    },
    Difference {
        behaviour: "checkpoint",
        runc: "checkpoint: UNKNOWN",
        bulkhead: "checkpoint: UNIMPLEMENTED",
        reason: "criu, which the node does not have for runc, takes the state of processes from their kernel, and theirs is the guest's",
    },
    Difference {
        behaviour: "terminal_of_an_exec",
        runc: "resize after the end: UNKNOWN",
        bulkhead: "resize after the end: OK",
        reason: "who has not heard of the end yet has done nothing wrong, and nothing is left to do",
    },
    Difference {
        behaviour: "terminal_of_an_exec",
        runc: "closed after the start",
        bulkhead: "closed before the start",
        reason: "runc's shim forgets a CloseIO that comes before there is a process, which then waits for ever",
    },
    Difference {
        behaviour: "terminal_without_input",
        runc: "wait: 129",
        bulkhead: "wait: 137",
        reason: "a terminal whose input has ended stays for its output; runc's shim hangs up, and it has to be killed here",
    },
    Difference {
        behaviour: "signals_and_their_codes",
        runc: "no signal to all: OK",
        bulkhead: "no signal to all: INVALID_ARGUMENT",
        reason: "what no process can be sent is an error, as it is under runc for a single process",
    },
    Difference {
        behaviour: "signalled_while_frozen",
        runc: "ends at once: 7",
        bulkhead: "ends when it is resumed: 7",
        reason: "what is paused stays so until Resume; runc lets it go on, and its shim says PAUSED still",
    },
    Difference {
        behaviour: "half_made_bundles",
        runc: "delete: fails",
        bulkhead: "delete: 137",
        reason: "there is nothing to delete, which is what containerd wants; a failure has it tell of an exit with 255",
    },
];

impl Difference {
    /// Whether it is why a behaviour sees these lines.
    pub fn explains(&self, behaviour: &str, runc: &str, bulkhead: &str) -> bool {
        (self.behaviour, self.runc, self.bulkhead) == (behaviour, runc, bulkhead)
    }

    /// Those that a behaviour should see.
    pub fn of(behaviour: &str) -> impl Iterator<Item = &'static Self> {
        DIFFERENCES
            .iter()
            .filter(move |difference| difference.behaviour == behaviour)
    }
}

/// Whether two lines that end in the codes of errors are the same but for how exact the codes are.
pub fn differ_in_code(runc: &str, bulkhead: &str) -> bool {
    match (runc.rsplit_once(": "), bulkhead.rsplit_once(": ")) {
        (Some((what, VAGUE)), Some((same, code))) => what == same && EXACT.contains(&code),
        _ => false,
    }
}
