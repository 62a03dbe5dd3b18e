//! [`Group`]: the limits that several nodes share, and the requests that wait for them.
//!
//! Requests wait in a queue per member and direction. The members with waiting requests take turns, one request each;
//! the directions take turns too where both could go. Whatever may change who can go (an arrival, the timer, new limits, a
//! drain) *settles* the group: it lets go what may go, in that order.
//!
//! In each direction one of the waiting requests keeps the timer: its task sleeps, on its own thread, until the buckets
//! have leaked enough, and settles. When it is let go, or its task is torn down, another waiting request gets the timer and
//! is woken to set it. So there is no timer to cancel, none that outlives its thread, and never more than one a direction.

use super::bucket::Buckets;
use super::{Direction, Limits};
use crate::clock::Clock;
use crate::driver::LocalFuture;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// A request that waits.
#[derive(Debug)]
struct Waiting {
    ticket: u64,
    bytes: u64,
    /// None until its task has been polled a first time.
    waker: Option<Waker>,
}

/// What waits of one member, by direction, each in order of tickets.
#[derive(Debug, Default)]
struct Queues {
    waiting: [VecDeque<Waiting>; 2],
    /// How many drains let its requests pass.
    released: u32,
}

/// One direction.
#[derive(Debug, Default)]
struct Lane {
    /// The members with waiting requests; the first has its turn.
    turns: VecDeque<u64>,
    /// The member and the ticket of the request that keeps the timer. There is one whenever something waits.
    timer: Option<(u64, u64)>,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    buckets: Buckets,
    members: BTreeMap<u64, Queues>,
    next_member: u64,
    next_ticket: u64,
    lanes: [Lane; 2],
    /// The direction that went last.
    last: Direction,
}

/// Limits with a name, and who shares them.
#[derive(Debug)]
pub struct Group {
    name: String,
    clock: Arc<dyn Clock>,
    /// Whether there is a limit, by direction. A request that sees none takes no lock.
    limited: [AtomicBool; 2],
    /// Guards all the rest. Never held across an await, nor while a waker is called.
    state: Mutex<State>,
}

/// Wakers to call once the lock is released.
type Woken = Vec<Waker>;

fn wake(woken: Woken) {
    woken.into_iter().for_each(Waker::wake);
}

impl State {
    fn position(&self, direction: Direction, member: u64, ticket: u64) -> Option<usize> {
        let queue = self.members.get(&member)?.waiting.get(direction.index())?;
        queue.binary_search_by_key(&ticket, |request| request.ticket).ok()
    }

    fn lane(&mut self, direction: Direction) -> &mut Lane {
        let [read, write] = &mut self.lanes;
        match direction {
            Direction::Read => read,
            Direction::Write => write,
        }
    }

    fn queue(&mut self, direction: Direction, member: u64) -> Option<&mut VecDeque<Waiting>> {
        self.members.get_mut(&member)?.waiting.get_mut(direction.index())
    }

    /// Puts a request at the end of its member's queue.
    fn enqueue(&mut self, direction: Direction, member: u64, bytes: u64) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        if let Some(queue) = self.queue(direction, member) {
            queue.push_back(Waiting { ticket, bytes, waker: None });
            if queue.len() == 1 {
                self.lane(direction).turns.push_back(member);
            }
        }
        ticket
    }

    /// Lets the next request of `direction` go, if there is one and there is room.
    fn serve(&mut self, direction: Direction, woken: &mut Woken) -> bool {
        if self.lane(direction).turns.is_empty() || self.buckets.wait(direction) > 0 {
            return false;
        }
        let Some(member) = self.lane(direction).turns.pop_front() else { return false };
        let Some(queue) = self.queue(direction, member) else { return true };
        let Some(request) = queue.pop_front() else { return true };
        if !queue.is_empty() {
            self.lane(direction).turns.push_back(member);
        }
        self.go(direction, request, woken);
        true
    }

    fn go(&mut self, direction: Direction, request: Waiting, woken: &mut Woken) {
        self.buckets.account(direction, request.bytes);
        woken.extend(request.waker);
    }

    /// Lets go what may go at `now`, and sees to it that somebody keeps the timer of what has to wait.
    fn settle(&mut self, now: u64) -> Woken {
        let mut woken = Woken::new();
        self.buckets.advance(now);
        while let Some(went) = [self.last.other(), self.last].into_iter().find(|d| self.serve(*d, &mut woken)) {
            self.last = went;
        }
        self.keep_timers(&mut woken);
        woken
    }

    fn keep_timers(&mut self, woken: &mut Woken) {
        for direction in Direction::ALL {
            let kept = self.lane(direction).timer;
            if kept.is_some_and(|(member, ticket)| self.position(direction, member, ticket).is_some()) {
                continue;
            }
            let member = self.lane(direction).turns.front().copied();
            let next = member.and_then(|member| {
                let request = self.queue(direction, member)?.front()?;
                Some(((member, request.ticket), request.waker.clone()))
            });
            self.lane(direction).timer = next.as_ref().map(|(holder, _)| *holder);
            woken.extend(next.and_then(|(_, waker)| waker));
        }
    }

    /// Wakes those who keep a timer, for it may be due at another time now.
    fn wake_timers(&mut self, woken: &mut Woken) {
        for direction in Direction::ALL {
            let Some((member, ticket)) = self.lane(direction).timer else { continue };
            let Some(at) = self.position(direction, member, ticket) else { continue };
            let request = self.queue(direction, member).and_then(|queue| queue.get(at));
            woken.extend(request.and_then(|request| request.waker.clone()));
        }
    }

    /// Takes all requests of a member out, in order.
    fn take_all(&mut self, member: u64) -> Vec<(Direction, Waiting)> {
        let mut all = Vec::new();
        for direction in Direction::ALL {
            all.extend(
                self.queue(direction, member)
                    .map(std::mem::take)
                    .unwrap_or_default()
                    .into_iter()
                    .map(|w| (direction, w)),
            );
            self.lane(direction).turns.retain(|other| *other != member);
        }
        all
    }
}

impl Group {
    /// A group with these limits. Its time is that of `clock`.
    pub fn new(name: &str, limits: Limits, clock: Arc<dyn Clock>) -> Arc<Self> {
        let buckets = Buckets::new(&limits, clock.now());
        Arc::new(Self {
            name: name.to_owned(),
            limited: Direction::ALL.map(|direction| AtomicBool::new(limits.limits(direction))),
            state: Mutex::new(State {
                limits,
                buckets,
                members: BTreeMap::new(),
                next_member: 0,
                next_ticket: 0,
                lanes: [Lane::default(), Lane::default()],
                last: Direction::Write,
            }),
            clock,
        })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.lock().limits
    }

    /// Changes the limits. What waits is judged anew at once, with empty buckets.
    pub fn set_limits(&self, limits: Limits) {
        let now = self.clock.now();
        let woken = {
            let mut state = self.lock();
            state.limits = limits;
            state.buckets = Buckets::new(&limits, now);
            for (limited, direction) in self.limited.iter().zip(Direction::ALL) {
                limited.store(limits.limits(direction), Ordering::Release);
            }
            let mut woken = state.settle(now);
            state.wake_timers(&mut woken);
            woken
        };
        wake(woken);
    }

    /// How many nodes share the limits.
    pub fn members(&self) -> usize {
        self.lock().members.len()
    }

    /// A new member.
    pub fn join(self: &Arc<Self>) -> Member {
        let mut state = self.lock();
        let id = state.next_member;
        state.next_member += 1;
        state.members.insert(id, Queues::default());
        Member { group: Arc::clone(self), id }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A node in a group. Leaves it when dropped.
pub struct Member {
    group: Arc<Group>,
    id: u64,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({} of {})", self.id, self.group.name)
    }
}

impl Member {
    /// The group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Whether requests of a direction have a limit, and are not free to go.
    #[inline]
    pub fn is_limited(&self, direction: Direction) -> bool {
        let limited = self.group.limited.get(direction.index());
        limited.is_some_and(|limited| limited.load(Ordering::Acquire))
    }

    /// Waits until a request of `bytes` bytes may go, and counts it.
    pub async fn pass(&self, direction: Direction, bytes: u64) {
        if self.is_limited(direction) {
            Wait { member: self, direction, bytes, ticket: None, sleep: None }.await;
        }
    }

    /// Lets go what waits, and lets pass what comes, until [`Member::hold`]; all of it is counted. Nests.
    pub fn release(&self) {
        let now = self.group.clock.now();
        let woken = {
            let mut state = self.group.lock();
            if let Some(queues) = state.members.get_mut(&self.id) {
                queues.released += 1;
            }
            let mut woken = Woken::new();
            state.buckets.advance(now);
            for (direction, request) in state.take_all(self.id) {
                state.go(direction, request, &mut woken);
            }
            state.keep_timers(&mut woken);
            woken
        };
        wake(woken);
    }

    /// Takes one [`Member::release`] back.
    pub fn hold(&self) {
        if let Some(queues) = self.group.lock().members.get_mut(&self.id) {
            queues.released = queues.released.saturating_sub(1);
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let woken = {
            let mut state = self.group.lock();
            let mut woken: Woken =
                state.take_all(self.id).into_iter().filter_map(|(_, request)| request.waker).collect();
            state.members.remove(&self.id);
            state.keep_timers(&mut woken);
            woken
        };
        wake(woken);
    }
}

/// A request on its way through the group.
struct Wait<'a> {
    member: &'a Member,
    direction: Direction,
    bytes: u64,
    /// Set while the request may be in a queue.
    ticket: Option<u64>,
    /// The timer, where this request keeps it, and when it is due.
    sleep: Option<(u64, LocalFuture<'static, ()>)>,
}

/// What a look at the group says to a request.
enum Verdict {
    Go,
    Wait,
    /// Wait, and settle at that time.
    Keep(u64),
}

impl Wait<'_> {
    fn look(&mut self, cx: &Context<'_>) -> (Verdict, Woken) {
        let (group, id, direction) = (&self.member.group, self.member.id, self.direction);
        let now = group.clock.now();
        let mut state = group.lock();
        let mut woken = Woken::new();
        let ticket = match self.ticket {
            Some(ticket) => {
                if state.lane(direction).timer == Some((id, ticket)) {
                    woken = state.settle(now);
                }
                ticket
            }
            None if state.members.get(&id).is_none_or(|queues| queues.released > 0) => {
                state.buckets.advance(now);
                state.buckets.account(direction, self.bytes);
                return (Verdict::Go, woken);
            }
            None => {
                let ticket = state.enqueue(direction, id, self.bytes);
                woken = state.settle(now);
                ticket
            }
        };
        self.ticket = Some(ticket);
        let Some(at) = state.position(direction, id, ticket) else {
            self.ticket = None;
            return (Verdict::Go, woken);
        };
        if let Some(request) = state.queue(direction, id).and_then(|queue| queue.get_mut(at)) {
            request.waker = Some(cx.waker().clone());
        }
        if state.lane(direction).timer == Some((id, ticket)) {
            (Verdict::Keep(now.saturating_add(state.buckets.wait(direction))), woken)
        } else {
            (Verdict::Wait, woken)
        }
    }
}

impl Future for Wait<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let (verdict, woken) = self.look(cx);
            wake(woken);
            let due = match verdict {
                Verdict::Go => return Poll::Ready(()),
                Verdict::Wait => {
                    self.sleep = None;
                    return Poll::Pending;
                }
                Verdict::Keep(due) => due,
            };
            if self.sleep.as_ref().is_none_or(|(set, _)| *set != due) {
                self.sleep = Some((due, self.member.group.clock.sleep_until(due)));
            }
            if let Some((_, sleep)) = &mut self.sleep {
                std::task::ready!(sleep.as_mut().poll(cx));
                self.sleep = None;
            }
        }
    }
}

impl Drop for Wait<'_> {
    /// A task is torn down only with its thread; what it leaves must not hold up the others.
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let (id, direction) = (self.member.id, self.direction);
        let woken = {
            let mut state = self.member.group.lock();
            let Some(at) = state.position(direction, id, ticket) else { return };
            let empty = state.queue(direction, id).is_some_and(|queue| {
                queue.remove(at);
                queue.is_empty()
            });
            if empty {
                state.lane(direction).turns.retain(|other| *other != id);
            }
            let mut woken = Woken::new();
            state.keep_timers(&mut woken);
            woken
        };
        wake(woken);
    }
}
