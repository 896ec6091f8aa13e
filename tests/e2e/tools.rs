//! Other people's tools against us: aoetools, and tshark's dissector.
//!
//! Every aoetools call ran into its time limit against vblade, whose answers
//! are shorter than 60 bytes. The rest of aoetools (aoe-discover, aoe-stat..)
//! speaks with the kernel's driver, not with a target.

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use initiator::client::Client;
use initiator::frame::{Ata, Directive, Frame, opcode};
use initiator::lab::{self, Deadline, Namespace, Need, Spawn, Veth};

use crate::rig::{QUICK, Rig, SOON};
use crate::support::{Store, Wire, serve, stop};

/// Runs a tool to its end; its exit status and what it printed.
fn run(namespace: &Namespace, line: &str) -> (i32, Vec<String>) {
    let mut words = line.split(' ');
    let path = std::env::var("PATH").unwrap_or_default();
    let start = Instant::now();
    let mut process = Spawn::new(words.next().unwrap())
        .inside(namespace)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .args(words)
        .start()
        .unwrap();
    let status = process.wait(Deadline::seconds(30)).unwrap();
    println!("{line}: {status} after {:?}", start.elapsed());
    (status.code().unwrap_or(-1), process.output())
}

/// Runs a tool that must succeed.
#[track_caller]
fn good(namespace: &Namespace, line: &str) -> Vec<String> {
    let (code, lines) = run(namespace, line);
    assert_eq!(code, 0, "{line}: {lines:?}");
    lines
}

/// The bytes of a tool's hex dump, which stands behind this line.
fn dump(lines: &[String], behind: &str) -> Vec<u8> {
    let at = lines.iter().position(|l| l == behind).unwrap();
    let words = lines[at + 1..].iter().flat_map(|l| l.split_whitespace());
    words
        .map_while(|w| u8::from_str_radix(w, 16).ok())
        .collect()
}

#[test]
fn aoeping_gets_its_answers() {
    let needs = [Need::Network, Need::Program("aoeping")];
    if !lab::require("aoeping", &needs) {
        return;
    }
    for engine in ["receive=ring", "receive=recvmmsg"] {
        let mut rig = Rig::new(1500, &["--set", engine]);
        let peer = &rig.wire.peer;
        // Without a time limit of its own it waits for ever.
        good(peer, "aoeping 1 1 ini0");
        let said = good(peer, "aoeping -v 1 1 ini0").join("\n");
        let mac = rig.client.target_mac().to_string().replace(':', "");
        assert!(
            said.contains(&format!("found e1.1 with mac {mac}")),
            "{said}"
        );
        let identify = rig.client.identify().unwrap();
        for line in ["aoeping -i 1 1 ini0", "aoeping -s 20 -t 77 -i 1 1 ini0"] {
            let bytes = dump(&good(peer, line), "device identify response:");
            assert_eq!(bytes, identify.bytes());
        }
        let fields = good(peer, "aoeping -I 1 1 ini0").join("\n");
        assert!(fields.contains("model: AoEde virtual blade"), "{fields}");
        assert!(fields.contains("serial_number: 1.1:"), "{fields}");
        // Nobody is there, and nobody answers for him.
        let start = Instant::now();
        let (code, _) = run(peer, "aoeping -s 1 1 2 ini0");
        assert_ne!(code, 0);
        assert!(start.elapsed() >= Duration::from_millis(900));
        rig.finish();
    }
}

#[test]
fn aoeping_gets_smart() {
    let needs = [Need::Network, Need::Program("aoeping")];
    if !lab::require("aoeping -S", &needs) {
        return;
    }
    let rig = Rig::new(1500, &[]);
    let peer = &rig.wire.peer;
    let smart = |command: &str| run(peer, &format!("aoeping -s 20 -S {command} 1 1 ini0"));
    let mid = |lines: &[String]| {
        let line = lines.iter().find(|l| l.contains("LBA Mid:")).unwrap();
        line.trim().to_owned()
    };
    let (code, said) = smart("read_data");
    let page = dump(&said, "SMART data:");
    assert_eq!((code, page.len()), (0, 512));
    assert_eq!(page.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
    let (code, said) = smart("return_status");
    assert_eq!((code, mid(&said).as_str()), (0, "LBA Mid: 0x4f"));
    assert_eq!(smart("disable").0, 0);
    for refused in ["read_data", "return_status", "disable"] {
        let (code, said) = smart(refused);
        assert_ne!(code, 0);
        assert!(said.join("\n").contains("aborted on target"), "{said:?}");
    }
    assert_eq!(smart("enable").0, 0);
    assert_eq!(smart("return_status").0, 0);
    // Logs and self-tests are not there, and that is an answer too.
    for refused in ["read_log:1", "offline_immediate"] {
        let (code, said) = smart(refused);
        assert_ne!(code, 0);
        assert!(said.join("\n").contains("aborted on target"), "{said:?}");
    }
    rig.finish();
}

#[test]
fn aoecfg_reads_tests_and_sets() {
    let needs = [Need::Network, Need::Program("aoecfg")];
    if !lab::require("aoecfg", &needs) {
        return;
    }
    let mut rig = Rig::new(1500, &[]);
    let peer = &rig.wire.peer;
    let cfg = |arguments: &str| good(peer, &format!("aoecfg {arguments} 1 1 ini0")).join("\n");
    assert_eq!(cfg("-t 20"), "");
    assert_eq!(cfg("-c read"), "");
    assert_eq!(cfg("-c set -s hello"), "hello");
    assert_eq!(cfg("-c set -s hello"), "hello");
    assert_eq!(cfg("-t 20"), "hello");
    assert_eq!(cfg("-c test -s hello"), "hello");
    assert_eq!(cfg("-c prefix -s hel"), "hello");
    // Another string is there: no success, and what it prints for that.
    assert_eq!(cfg("-c set -s other"), "*badcfg*");
    assert_eq!(cfg("-c fset -s other"), "other");
    // Silence, until its time limit.
    assert_eq!(cfg("-t 1 -c test -s hello"), "");
    assert_eq!(cfg("-t 1 -c prefix -s hello"), "");
    let every = good(peer, "aoecfg -t 1 65535 255 ini0").join("\n");
    assert!(every.contains("other"), "{every}");
    assert_eq!(rig.client.config_read().unwrap().string, b"other");
    rig.finish();
}

#[test]
fn aoe_sancheck_is_content_with_both_paths() {
    let needs = [Need::Network, Need::Program("aoe-sancheck")];
    if !lab::require("aoe-sancheck", &needs) {
        return;
    }
    let (wire, store) = (Wire::new(9000), Store::new(64));
    Veth::new(("tgt1", &wire.host), ("ini1", &wire.peer), 9000).unwrap();
    let target = serve(&wire.host, &store, &["tgt0", "tgt1"], &QUICK);
    // It looks for 5 s, and probes with IDENTIFY and payloads up to the MTU.
    let said = good(&wire.peer, "aoe-sancheck -v");
    let line = said.iter().find(|l| l.starts_with("e1.1\t")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[..3], ["e1.1", "2", "8704"], "{said:?}");
    assert!(
        words[3].contains("ini0") && words[3].contains("ini1"),
        "{line}"
    );
    // What it has to complain of stands indented below the device.
    let at = said.iter().position(|l| l == line).unwrap();
    let below = &said[at + 1];
    assert!(below.is_empty() || below.ends_with(':'), "{said:?}");
    stop(target);
}

/// A capture of our own, so that no frame of the exchange is missing in it.
struct Capture(File);

impl Capture {
    fn new(path: &std::path::Path) -> Capture {
        let mut file = File::create(path).unwrap();
        // Classic pcap: magic, version 2.4, zone, accuracy, longest, Ethernet.
        for word in [0xA1B2_C3D4u32, 2 | 4 << 16, 0, 0, 65535, 1] {
            file.write_all(&word.to_ne_bytes()).unwrap();
        }
        Capture(file)
    }

    fn add(&mut self, frame: &[u8]) {
        let len = frame.len() as u32;
        for word in [0, 0, len, len] {
            self.0.write_all(&word.to_ne_bytes()).unwrap();
        }
        self.0.write_all(frame).unwrap();
    }

    /// Asks, and keeps question and answer.
    fn ask(&mut self, client: &mut Client, frame: &Frame) {
        let request = client.send(frame).unwrap();
        let tag = [request[20], request[21], request[22], request[23]];
        let deadline = Deadline::after(SOON).instant();
        let reply = client
            .recv_like(deadline, |reply| reply.tag_bytes() == tag)
            .unwrap()
            .unwrap_or_else(|| panic!("no answer to {frame:?}"));
        assert_eq!(reply.breaches(&request, 1, 1), Vec::<String>::new());
        self.add(&request);
        self.add(reply.bytes());
    }
}

#[test]
fn tshark_finds_nothing_malformed_in_what_we_say() {
    let needs = [Need::Network, Need::Program("tshark")];
    if !lab::require("tshark", &needs) {
        return;
    }
    let (wire, store) = (Wire::new(9000), Store::new(64));
    let path = store.path().join("ours.pcap");
    let mut capture = Capture::new(&path);
    let mut client = wire.peer.enter(|| Client::open("ini0")).unwrap().unwrap();
    let target = serve(&wire.host, &store, &["tgt0"], &QUICK);
    let advertisement = client
        .recv(Deadline::after(SOON).instant())
        .unwrap()
        .unwrap();
    capture.add(advertisement.bytes());
    client.connect(1, 1).unwrap();
    let own = client.mac();
    let registers = |opcode, feature, lba| {
        let registers = Ata {
            feature,
            count: 1,
            opcode,
            lba,
            ..Ata::default()
        };
        Frame::ata(registers, &[])
    };
    let frames = [
        Frame::config(0, b""),
        Frame::config(3, b"a string"),
        Frame::config(3, b"another"),
        Frame::config(9, b""),
        Frame::identify(),
        Frame::write(0, &[7; 17 * 512]),
        Frame::read(0, 17),
        Frame::read(0, 18),
        Frame::read(64, 1),
        Frame::flush(),
        registers(opcode::CHECK_POWER_MODE, 0, 0),
        registers(opcode::SMART, 0xD0, 0xC2_4F00),
        registers(opcode::SMART, 0xDA, 0xC2_4F00),
        registers(opcode::SET_FEATURES, 0x82, 0),
        registers(opcode::READ_VERIFY_EXT, 0, 5),
        registers(0x99, 0, 0),
        Frame::mask_edit(&[Directive::add(own), Directive::delete(own)]),
        Frame::mask_edit(&[Directive::add(own)]),
        Frame::mask_edit(&[Directive::extension_on("nonesuch")]),
        Frame::mask_read(),
        Frame::reserve(1, &[own]),
        Frame::reserve(0, &[]),
        Frame::identify().version_flags(0x20),
        Frame::command(0xF0, vec![1, 2, 3]),
    ];
    for frame in &frames {
        capture.ask(&mut client, frame);
    }
    stop(target);
    let tshark = |arguments: &[&str]| {
        let output = Command::new("tshark")
            .arg("-r")
            .arg(&path)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    // All of it in one go: the program takes its time to start.
    let filter = "aoe.response == 1 || _ws.malformed || !aoe";
    let fields = [
        "_ws.malformed",
        "eth.type",
        "aoe.version",
        "aoe.major",
        "aoe.minor",
        "frame.protocols",
    ];
    let mut arguments = vec!["-Y", filter, "-T", "fields", "-E", "separator=|"];
    for field in fields {
        arguments.extend(["-e", field]);
    }
    let answers = tshark(&arguments);
    let lines: Vec<&str> = answers.lines().collect();
    assert_eq!(lines.len(), frames.len() + 1, "{answers}");
    for line in lines {
        let words: Vec<&str> = line.split('|').collect();
        assert_eq!(words[0], "", "malformed: {line}");
        assert_eq!(words[1..5], ["0x88a2", "1", "0x0001", "0x01"], "{line}");
        assert!(words[5].contains("aoe"), "{line}");
    }
}
