//! The ordinary way: find, identify, write, read, stop.

use initiator::lab::{self, Need};

use crate::support::{Store, Wire, serve, stop};

#[test]
fn a_disk_is_found_written_read_and_whole_after_the_stop() {
    if !lab::require("serving over veth", &[Need::Network]) {
        return;
    }
    let (wire, store) = (Wire::new(1500), Store::new(2048));
    let target = serve(&wire.host, &store, &["tgt0"], &[]);
    let mut client = wire.client();
    assert_eq!(client.identify().unwrap().sectors(), 2048);
    let data: Vec<u8> = (0..20 * 512).map(|i| (i / 7) as u8).collect();
    client.write_many(2028, &data).unwrap();
    assert_eq!(client.read_many(2028, 20).unwrap(), data);
    client.flush().unwrap();
    stop(target);
    assert_eq!(store.sectors(2028, 20), data);
    assert!(store.sectors(0, 2028).iter().all(|byte| *byte == 0));
}
