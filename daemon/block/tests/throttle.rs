//! Throttle groups: the buckets against an exact model, turns, live changes, drains, many threads. The time is the tests'.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "test code"
)]

use block::clock::SystemClock;
use block::testing::{ManualClock, ManualHandle};
use block::throttle::{Direction, Group, Limit, Limits, Member};
use proptest::prelude::*;
use qapi::Qapi;
use qapi::types::throttle::{ThrottleGroupProperties, ThrottleLimits};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

const SECOND: u64 = 1_000_000_000;

/// Notes that it was called.
#[derive(Default)]
struct Flag(AtomicUsize);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// One request and the task it runs in.
struct Task {
    name: usize,
    future: Pin<Box<dyn Future<Output = ()>>>,
    flag: Arc<Flag>,
}

/// Requests on one thread: polls only who was woken, so that a lost wake-up shows as a request that never ends.
#[derive(Default)]
struct Tasks {
    waiting: Vec<Task>,
    done: Vec<usize>,
}

impl Tasks {
    fn start(&mut self, name: usize, member: &Arc<Member>, direction: Direction, bytes: u64) {
        let member = Arc::clone(member);
        let future = Box::pin(async move { member.pass(direction, bytes).await });
        let flag = Arc::new(Flag(AtomicUsize::new(1)));
        self.waiting.push(Task { name, future, flag });
        self.run();
    }

    fn run(&mut self) {
        loop {
            let Some(i) = self.waiting.iter().position(|task| task.flag.0.swap(0, Ordering::Relaxed) > 0) else {
                return;
            };
            let task = &mut self.waiting[i];
            let waker = Waker::from(Arc::clone(&task.flag));
            if task.future.as_mut().poll(&mut Context::from_waker(&waker)) == Poll::Ready(()) {
                self.done.push(self.waiting.remove(i).name);
            }
        }
    }

    fn take_done(&mut self) -> Vec<usize> {
        std::mem::take(&mut self.done)
    }
}

fn limits(json: Value) -> Limits {
    Limits::default().with(&ThrottleLimits::from_value(&json).unwrap()).unwrap()
}

fn group(limits: Limits) -> (Arc<ManualClock>, Arc<Group>) {
    let clock = ManualClock::new();
    let group = Group::new("g", limits, Arc::new(ManualHandle(Arc::clone(&clock))));
    (clock, group)
}

/// What a bucket of this rate holds at `now`, from the history of what went in: the fullest that any start of the history
/// would leave, if nothing had been there before. In billionths of a unit, exact.
fn level(history: &[(u64, i128)], rate: u64, now: u64) -> i128 {
    let mut best = 0;
    let mut sum = 0;
    for (at, units) in history.iter().rev() {
        sum += units;
        best = best.max(sum - i128::from(rate) * i128::from(now - at));
    }
    best
}

/// The first moment from `now` on at which `limit` lets a request go, given what has gone.
fn opens(limit: &Limit, history: &[(u64, i128)], now: u64) -> u64 {
    let wait = |rate: u64, size: i128| {
        let extra = level(history, rate, now) - size;
        if extra <= 0 { 0 } else { ((extra + i128::from(rate) - 1) / i128::from(rate)) as u64 }
    };
    let nano = 1_000_000_000_i128;
    let Limit { avg, max, length } = *limit;
    match (avg, max) {
        (0, _) => now,
        (_, 0) => now + wait(avg, i128::from(avg) * nano / 10),
        _ => {
            let long = wait(avg, i128::from(max) * i128::from(length) * nano);
            let short = if length > 1 && long == 0 { wait(max, i128::from(max) * nano / 10) } else { 0 };
            now + long.max(short)
        }
    }
}

fn any_limit() -> impl Strategy<Value = Limit> {
    (1..5000u64, prop_oneof![Just(0u64), 1..4u64], 1..4u64).prop_map(|(avg, factor, length)| Limit {
        avg,
        max: avg * factor,
        length: if factor == 0 { 1 } else { length },
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each request goes at the very nanosecond at which all its buckets are down to their sizes, in order.
    #[test]
    fn the_buckets_are_exact(
        iops in any_limit(),
        bps in any_limit(),
        op_size in prop_oneof![Just(0u64), 1..3000u64],
        requests in prop::collection::vec((0..SECOND / 3, 0..4000u64), 1..60),
    ) {
        let limits = Limits { buckets: [iops, Limit::default(), Limit::default(), bps, Limit::default(), Limit::default()], op_size };
        let (clock, group) = group(limits);
        let member = Arc::new(group.join());
        let mut tasks = Tasks::default();

        // What must be: times at which each goes.
        let (mut ops, mut bytes_in) = (Vec::new(), Vec::new());
        let mut expected = Vec::new();
        let (mut arrival, mut before) = (0, 0);
        for (gap, bytes) in &requests {
            arrival += gap;
            let mut at = arrival.max(before);
            loop {
                let next = opens(&iops, &ops, at).max(opens(&bps, &bytes_in, at));
                if next == at { break; }
                at = next;
            }
            let units = if op_size > 0 && *bytes > op_size {
                i128::from(*bytes) * 1_000_000_000 / i128::from(op_size)
            } else {
                1_000_000_000
            };
            ops.push((at, units));
            bytes_in.push((at, i128::from(*bytes) * 1_000_000_000));
            expected.push(at);
            before = at;
        }

        // What is.
        let mut went = vec![u64::MAX; requests.len()];
        let mut now = 0;
        let mut arrivals: VecDeque<_> = requests.iter().enumerate().scan(0, |at, (i, (gap, bytes))| {
            *at += gap;
            Some((*at, i, *bytes))
        }).collect();
        loop {
            let next = arrivals.front().map(|a| a.0).into_iter().chain(clock.next()).min();
            let Some(next) = next else { break };
            now = now.max(next);
            clock.advance_to(now);
            tasks.run();
            tasks.take_done().into_iter().for_each(|i| went[i] = now);
            while arrivals.front().is_some_and(|a| a.0 <= now) {
                let (_, i, bytes) = arrivals.pop_front().unwrap();
                tasks.start(i, &member, Direction::Read, bytes);
                tasks.take_done().into_iter().for_each(|i| went[i] = now);
            }
            prop_assert!(clock.timers() <= 1, "one timer for one direction");
        }
        prop_assert!(tasks.waiting.is_empty(), "something was never let go");
        prop_assert_eq!(went, expected);
    }
}

#[test]
fn members_take_turns() {
    let (clock, group) = group(limits(json!({ "iops-total": 10 })));
    let members: Vec<_> = (0..3).map(|_| Arc::new(group.join())).collect();
    let mut tasks = Tasks::default();
    // The first member comes early and with many; the others come late and with few.
    for (member, count) in [(0, 12), (1, 3), (2, 3)] {
        for _ in 0..count {
            tasks.start(member, &members[member], Direction::Read, 512);
        }
    }
    // A tenth of a second's worth, and the one that fills the bucket over it.
    assert_eq!(tasks.take_done(), [0, 0]);
    let mut order = Vec::new();
    while let Some(at) = clock.next() {
        assert_eq!(clock.timers(), 1);
        clock.advance_to(at);
        tasks.run();
        order.extend(tasks.take_done());
    }
    assert_eq!(order, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn directions_take_turns_and_each_has_one_timer() {
    let (clock, group) = group(limits(json!({ "iops-total": 10 })));
    let members: Vec<_> = (0..4).map(|_| Arc::new(group.join())).collect();
    let mut tasks = Tasks::default();
    for member in &members {
        for _ in 0..4 {
            tasks.start(0, member, Direction::Read, 512);
            tasks.start(1, member, Direction::Write, 512);
        }
    }
    let mut order = tasks.take_done();
    while let Some(at) = clock.next() {
        assert!(clock.timers() <= 2);
        clock.advance_to(at);
        tasks.run();
        order.extend(tasks.take_done());
    }
    assert_eq!(order.len(), 32);
    for pair in order.chunks(2) {
        assert_eq!(pair.iter().sum::<usize>(), 1, "{order:?}");
    }
}

#[test]
fn a_limit_on_reads_leaves_writes_alone() {
    let (clock, group) = group(limits(json!({ "iops-read": 1, "bps-write": 0 })));
    let member = Arc::new(group.join());
    let mut tasks = Tasks::default();
    for i in 0..100 {
        tasks.start(i, &member, Direction::Write, 1 << 40);
    }
    assert_eq!(tasks.take_done().len(), 100);
    (0..3).for_each(|i| tasks.start(i, &member, Direction::Read, 1));
    assert_eq!(tasks.take_done(), [0]);
    clock.advance_to(SECOND);
    tasks.run();
    assert_eq!(tasks.take_done(), [1]);
}

#[test]
fn new_limits_hold_at_once() {
    let (clock, group) = group(limits(json!({ "bps-total": 1 })));
    let member = Arc::new(group.join());
    let mut tasks = Tasks::default();
    (0..4).for_each(|i| tasks.start(i, &member, Direction::Read, 1 << 30));
    assert_eq!(tasks.take_done(), [0]);
    let long = clock.next().unwrap();
    assert!(long > 30 * 365 * 86400 * SECOND, "a gibibyte at a byte a second");
    // Faster: empty buckets let one go at once, and the timer is set anew.
    group.set_limits(limits(json!({ "bps-total": 1 << 30 })));
    tasks.run();
    assert_eq!(tasks.take_done(), [1]);
    assert_eq!(clock.timers(), 1);
    clock.advance_to(clock.next().unwrap());
    tasks.run();
    assert_eq!(tasks.take_done(), [2]);
    // Slower, then none at all.
    group.set_limits(limits(json!({ "bps-total": 1 })));
    tasks.run();
    assert_eq!(tasks.take_done(), [3]);
    tasks.start(4, &member, Direction::Read, 1);
    assert_eq!(tasks.take_done(), [0; 0]);
    group.set_limits(Limits::default());
    tasks.run();
    assert_eq!(tasks.take_done(), [4]);
    assert_eq!(clock.timers(), 0);
}

#[test]
fn a_drain_lets_go_of_one_member_only() {
    let (clock, group) = group(limits(json!({ "iops-total": 1 })));
    let [a, b] = [Arc::new(group.join()), Arc::new(group.join())];
    let mut tasks = Tasks::default();
    for i in 0..3 {
        tasks.start(i, &a, Direction::Write, 1);
        tasks.start(10 + i, &b, Direction::Write, 1);
    }
    assert_eq!(tasks.take_done(), [0]);
    a.release();
    tasks.run();
    assert_eq!(tasks.take_done(), [1, 2]);
    tasks.start(3, &a, Direction::Write, 1);
    assert_eq!(tasks.take_done(), [3]);
    a.hold();
    tasks.start(4, &a, Direction::Write, 1);
    assert_eq!(tasks.take_done(), [0; 0]);
    // What passed was counted: four requests have gone, so the next goes in the fourth second, and it is b's.
    assert_eq!(clock.timers(), 1);
    clock.advance_to(clock.next().unwrap());
    tasks.run();
    assert!(clock.next().is_some());
    clock.advance_to(4 * SECOND);
    tasks.run();
    assert_eq!(tasks.take_done(), [10]);
}

/// The task that keeps the timer is torn down: another takes over.
#[test]
fn the_timer_survives_its_keeper() {
    let (clock, group) = group(limits(json!({ "iops-total": 1 })));
    let member = Arc::new(group.join());
    let mut tasks = Tasks::default();
    (0..4).for_each(|i| tasks.start(i, &member, Direction::Read, 1));
    assert_eq!(tasks.take_done(), [0]);
    tasks.waiting.remove(0);
    tasks.run();
    assert_eq!(clock.timers(), 1);
    clock.advance_to(SECOND);
    tasks.run();
    assert_eq!(tasks.take_done(), [2]);
    drop(tasks);
    assert_eq!(clock.timers(), 0);
    drop(member);
    assert_eq!(group.members(), 0);
}

/// Several threads on one group with the real clock: nothing is lost and nobody waits for ever.
#[test]
fn several_threads_share_a_group() {
    let rate = 4000;
    let group = Group::new("g", limits(json!({ "iops-total": rate })), Arc::new(SystemClock::default()));
    let counts: Arc<Vec<AtomicUsize>> = Arc::new((0..4).map(|_| AtomicUsize::new(0)).collect());
    let each = 200;
    let threads: Vec<_> = (0..4)
        .map(|i| {
            let (group, counts) = (Arc::clone(&group), Arc::clone(&counts));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                tokio::task::LocalSet::new().block_on(&runtime, async {
                    let member = Arc::new(group.join());
                    let mut clients = Vec::new();
                    for client in 0..4 {
                        let (member, counts) = (Arc::clone(&member), Arc::clone(&counts));
                        clients.push(tokio::task::spawn_local(async move {
                            let direction = if client % 2 == 0 { Direction::Read } else { Direction::Write };
                            for _ in 0..each / 4 {
                                member.pass(direction, 4096).await;
                                counts[i].fetch_add(1, Ordering::Relaxed);
                            }
                        }));
                    }
                    for client in clients {
                        client.await.unwrap();
                    }
                });
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == each));
    assert_eq!(group.members(), 0);
}

#[test]
fn limits_are_checked_as_the_reference_does() {
    let refused =
        |json: Value| Limits::default().with(&ThrottleLimits::from_value(&json).unwrap()).unwrap_err().to_string();
    for (json, text) in [
        (
            json!({ "iops-total": 10, "iops-read": 10 }),
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        (json!({ "iops-size": 10 }), "iops size requires an iops value to be set"),
        (json!({ "bps-read": 4, "iops-size": 100 }), "iops size requires an iops value to be set"),
        (
            json!({ "iops-total": 1_000_000_000_000_001_i64 }),
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (json!({ "iops-total": -3 }), "bps/iops/max values must be within [0, 1000000000000000]"),
        (json!({ "iops-total": 10, "iops-total-max": 5 }), "bps_max/iops_max cannot be lower than bps/iops"),
        (json!({ "iops-total-max": 5 }), "bps_max/iops_max require corresponding bps/iops values"),
        (json!({ "iops-total": 10, "iops-total-max-length": 5 }), "burst length set without burst rate"),
        (json!({ "iops-total": 10, "iops-total-max-length": 0 }), "the burst length cannot be 0"),
        (
            json!({ "iops-total": 10, "iops-total-max": 50, "iops-total-max-length": 1_i64 << 32 }),
            "iops-total-max-length value must be in the range [0, 4294967295]",
        ),
        (
            json!({ "bps-read": 10, "bps-read-max": 1_000_000_000_000_000_i64, "bps-read-max-length": 2 }),
            "burst length too high for this burst rate",
        ),
    ] {
        assert_eq!(refused(json.clone()), text, "{json}");
    }
    // A change keeps what it does not name.
    let first = limits(json!({ "iops-total": 100, "iops-size": 4096 }));
    let second = first.with(&ThrottleLimits { bps_total: Some(7), ..ThrottleLimits::default() }).unwrap().to_qapi();
    assert_eq!((second.iops_total, second.bps_total, second.iops_size), (Some(100), Some(7), Some(4096)));
    // The single properties, with `limits` over them.
    let properties = |json: Value| Limits::of_properties(&ThrottleGroupProperties::from_value(&json).unwrap());
    let both =
        properties(json!({ "x-iops-total": 10, "x-bps-read": 3, "limits": { "iops-total": 20 } })).unwrap().to_qapi();
    assert_eq!((both.iops_total, both.bps_read), (Some(20), Some(3)));
    assert_eq!(
        properties(json!({ "x-iops-total": -1 })).unwrap_err().to_string(),
        "Property values cannot be negative"
    );
}
