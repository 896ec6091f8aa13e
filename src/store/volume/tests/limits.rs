//! Times of a freeze, in virtual time.

use super::*;
use crate::freeze::Phase;

/// Goes on until nothing more happens at this time.
fn rest(world: &mut World) {
    for _ in 0..200 {
        world.advance();
    }
}

/// A world that is frozen, with a write to the shadow.
fn frozen(freeze_max: Duration) -> World {
    let mut world = World::new(3, 40, true, 1, 0);
    world.volume.options.freeze_max = freeze_max;
    world
        .volume
        .order(world.now, Order::Freeze, [7; 16])
        .unwrap();
    rest(&mut world);
    assert_eq!(world.volume.phase(), Phase::Frozen);
    world.step(5, 10, 3);
    // Until what was written is in the shadow, and nothing is left to do.
    world.now += world.volume.options.max_dirty_age;
    rest(&mut world);
    world
}

#[test]
fn a_freeze_thaws_itself_after_freeze_max() {
    let max = Duration::from_secs(3600);
    let mut world = frozen(max);
    let began = world.now - world.volume.options.max_dirty_age;
    let still = world.medium.live();
    // It wakes by itself: for the reminders, and for the end.
    let mut wakes = Vec::new();
    while world.volume.phase() == Phase::Frozen {
        assert_eq!(world.medium.live(), still);
        let deadline = world.volume.deadline().unwrap();
        assert!(deadline > world.now, "it is woken again and again");
        world.now = deadline;
        wakes.push((world.now - began).as_secs());
        world.volume.advance(world.now);
    }
    let reminders: Vec<u64> = (10..=60).map(|minute| minute * 60).collect();
    assert_eq!(wakes, reminders);
    rest(&mut world);
    assert_eq!(world.volume.phase(), Phase::Running);
    assert_ne!(world.medium.live(), still);
    world.settle();
}

#[test]
fn without_freeze_max_it_stays_frozen() {
    let mut world = frozen(Duration::ZERO);
    let still = world.medium.live();
    for _ in 0..1000 {
        world.now = world.volume.deadline().unwrap();
        rest(&mut world);
        assert_eq!(world.volume.phase(), Phase::Frozen);
    }
    assert_eq!(world.medium.live(), still);
    world.settle();
}

#[test]
fn a_stop_that_keeps_the_shadow_is_not_overtaken_by_freeze_max() {
    let mut world = frozen(Duration::from_secs(60));
    world.volume.set_on_stop(crate::freeze::OnStop::Keep);
    world.volume.drain();
    world.now += Duration::from_secs(100);
    rest(&mut world);
    assert_eq!(world.volume.phase(), Phase::Frozen);
    assert!(world.volume.is_idle());
}
