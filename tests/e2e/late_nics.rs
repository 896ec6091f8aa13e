//! Interfaces that are not there when a target starts: refused, or waited for.

use initiator::frame::SECTOR;
use initiator::lab::{self, Need, Spawn};

use crate::support::{AOEDE, Store, command, stop};
use crate::workshop::{Lab, soon};

const IMAGE: u64 = 4096;

/// A target with the process id in its environment, as systemd starts one.
fn by_systemd(lab: &Lab, store: &Store) -> Spawn {
    Spawn::new("sh")
        .inside(&lab.host)
        .args(["-c", "SYSTEMD_EXEC_PID=$$ exec \"$@\"", "sh", AOEDE])
        .args(["1", "1", "tgt1", "tgt0", "tgt2"])
        .arg(store.image())
        .args(["--state-dir".as_ref(), store.state().as_os_str()])
        .args(["--run-dir".as_ref(), store.run().as_os_str()])
}

/// What a shell inherits from a service is no order to wait.
#[test]
fn an_interface_that_is_not_there_is_refused_in_a_shell_of_a_service() {
    if !lab::require("a missing interface in a shell", &[Need::Network]) {
        return;
    }
    let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
    let mut target = command(&lab.host, &store, &["tgt0", "tgt1"], &[])
        .env("INVOCATION_ID", "0123456789abcdef0123456789abcdef")
        .env("SYSTEMD_EXEC_PID", std::process::id().to_string())
        .start()
        .unwrap();
    assert_eq!(target.wait(soon()).unwrap().code(), Some(1));
    let output = target.output().join("\n");
    assert!(output.contains("tgt1: "), "{output}");
}

#[test]
fn interfaces_that_are_not_there_at_the_start_are_waited_for() {
    if !lab::require("--wait-for-interfaces", &[Need::Network]) {
        return;
    }
    for order in ["--wait-for-interfaces", "NOTIFY_SOCKET", "SYSTEMD_EXEC_PID"] {
        let (lab, store) = (Lab::new(1, 1500), Store::new(IMAGE));
        let nics = ["tgt1", "tgt0", "tgt2"];
        let spawn = match order {
            "NOTIFY_SOCKET" => command(&lab.host, &store, &nics, &[]).env(order, "1"),
            "SYSTEMD_EXEC_PID" => by_systemd(&lab, &store),
            option => command(&lab.host, &store, &nics, &[option]),
        };
        let mut target = spawn.start().unwrap();
        target.wait_for_line(": e1.1, ", soon()).unwrap();
        lab.client(0).write(3, &[3; SECTOR]).unwrap();
        for wire in [2, 1] {
            let nic = format!("tgt{wire}");
            let told =
                |l: &String| l.contains(&format!("{nic}: there is none")) && l.contains("waiting");
            let lines = target.output();
            assert_eq!(lines.iter().filter(|l| told(l)).count(), 1, "{lines:?}");
            lab.wire(wire, 9000);
            target.wait_for_line(&format!("{nic}: "), soon()).unwrap();
            let mut client = lab.client(wire);
            assert_eq!(client.read(3, 1).unwrap(), [3; SECTOR]);
            // Its frames are its own: more than a short MTU holds.
            let data = vec![wire as u8; 8 * SECTOR];
            client.write(8, &data).unwrap();
            assert_eq!(client.read(8, 8).unwrap(), data);
        }
        stop(target);
    }
    // Nothing is there yet at all.
    let (lab, store) = (Lab::new(0, 1500), Store::new(IMAGE));
    let mut target = command(&lab.host, &store, &["tgt0"], &["--wait-for-interfaces"])
        .start()
        .unwrap();
    target.wait_for_line(": e1.1, ", soon()).unwrap();
    lab.wire(0, 1500);
    lab.client(0).write(3, &[3; SECTOR]).unwrap();
    stop(target);
}
