//! The threads that wait for devices, and the deadlines of those that wait for them.
//!
//! A command runs on a thread of a fixed pool, because it may hang for as long as a device does. Who sent it gets an
//! answer at its deadline in any case; the thread stays with the device until the kernel lets go. So that one hung
//! device cannot take the whole pool, few commands of one device run at a time; the others wait for it, not for a
//! thread.

use crate::device::{Device, Executor, Number};
use ipc::classic::Reply;
use ipc::scsi::{Cdb, Sense, status};
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Commands of one device that run at a time.
pub const PER_DEVICE: usize = 2;

/// What executes commands: the devices, or a test's stand-in.
pub trait Execute: Send + Sync + 'static {
    /// Executes a command, however long it takes.
    fn execute(&self, device: &Device, cdb: &Cdb, parameters: &[u8]) -> Reply;
}

impl Execute for Executor {
    fn execute(&self, device: &Device, cdb: &Cdb, parameters: &[u8]) -> Reply {
        self.execute(device, cdb, parameters)
    }
}

/// A command on its way to a thread.
struct Task {
    device: Device,
    cdb: Cdb,
    parameters: Vec<u8>,
    answer: oneshot::Sender<Reply>,
    /// Given back when the device has answered, not when the client has.
    _permits: [OwnedSemaphorePermit; 3],
}

/// Hands commands to the threads; lives on the thread of the sockets.
pub struct Pool {
    tasks: Sender<Task>,
    threads: Arc<Semaphore>,
    /// The devices with commands on their way. Entries without any are removed as others come.
    devices: Mutex<HashMap<Number, Weak<Semaphore>>>,
    deadline: Duration,
}

/// The threads' end: each runs [`Workers::run`].
#[derive(Clone)]
pub struct Workers {
    tasks: Arc<Mutex<Receiver<Task>>>,
    executor: Arc<dyn Execute>,
}

/// A pool for `threads` threads whose clients wait at most `deadline`.
pub fn new(executor: Arc<dyn Execute>, threads: usize, deadline: Duration) -> (Pool, Workers) {
    let (sender, receiver) = channel();
    let pool = Pool {
        tasks: sender,
        threads: Arc::new(Semaphore::new(threads)),
        devices: Mutex::new(HashMap::new()),
        deadline,
    };
    (pool, Workers { tasks: Arc::new(Mutex::new(receiver)), executor })
}

impl Workers {
    /// Executes commands until the pool is gone.
    pub fn run(self) {
        loop {
            // The lock is held while waiting for a task, never while executing one.
            let task = match self.tasks.lock() {
                Ok(tasks) => tasks.recv(),
                Err(_) => return,
            };
            let Ok(task) = task else { return };
            let reply = self.executor.execute(&task.device, &task.cdb, &task.parameters);
            // The client may have its answer already.
            let _ = task.answer.send(reply);
            task.device.close_here();
        }
    }
}

impl Pool {
    /// Executes a command for somebody with this share of the threads; answers by the deadline.
    pub async fn execute(&self, share: &Arc<Semaphore>, device: Device, cdb: Cdb, parameters: Vec<u8>) -> Reply {
        let deadline = tokio::time::Instant::now() + self.deadline;
        let started = async {
            let of_device = self.of_device(device.number()).acquire_owned().await.ok()?;
            let of_share = share.clone().acquire_owned().await.ok()?;
            let of_pool = self.threads.clone().acquire_owned().await.ok()?;
            let (answer, answered) = oneshot::channel();
            self.tasks.send(Task { device, cdb, parameters, answer, _permits: [of_device, of_share, of_pool] }).ok()?;
            Some(answered)
        };
        let answered = match tokio::time::timeout_at(deadline, started).await {
            Ok(Some(answered)) => answered,
            // Never sent to the device: the initiator may repeat it.
            Ok(None) | Err(_) => return Reply::status(status::BUSY),
        };
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) => Reply::check(Sense::TARGET_FAILURE),
            Err(_) => Reply::check(Sense::TIMEOUT),
        }
    }

    fn of_device(&self, number: Number) -> Arc<Semaphore> {
        let mut devices = match self.devices.lock() {
            Ok(devices) => devices,
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some(semaphore) = devices.get(&number).and_then(Weak::upgrade) {
            return semaphore;
        }
        devices.retain(|_, semaphore| semaphore.strong_count() != 0);
        let semaphore = Arc::new(Semaphore::new(PER_DEVICE));
        devices.insert(number, Arc::downgrade(&semaphore));
        semaphore
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::scsi::Action;
    use std::sync::Condvar;

    /// Device 1 hangs until it is let go; the others answer.
    #[derive(Default)]
    struct Hanging {
        free: Mutex<bool>,
        changed: Condvar,
    }

    impl Hanging {
        fn let_go(&self) {
            *self.free.lock().unwrap() = true;
            self.changed.notify_all();
        }
    }

    impl Execute for Hanging {
        fn execute(&self, device: &Device, _: &Cdb, _: &[u8]) -> Reply {
            if device.number().minor == 1 {
                let free = self.free.lock().unwrap();
                drop(self.changed.wait_while(free, |free| !*free).unwrap());
            }
            Reply::status(status::GOOD)
        }
    }

    fn start(threads: usize, deadline: Duration) -> (Arc<Pool>, Arc<Hanging>) {
        let devices = Arc::new(Hanging::default());
        let (pool, workers) = new(devices.clone(), threads, deadline);
        for _ in 0..threads {
            let workers = workers.clone();
            std::thread::spawn(|| workers.run());
        }
        (Arc::new(pool), devices)
    }

    async fn run(pool: Arc<Pool>, minor: u32) -> Reply {
        run_of(&Arc::new(Semaphore::new(64)), pool, minor).await
    }

    async fn run_of(share: &Arc<Semaphore>, pool: Arc<Pool>, minor: u32) -> Reply {
        let cdb = Cdb::build(Action::ReadKeys, 0, 8);
        pool.execute(share, Device::of_number(Number { major: 8, minor }), cdb, Vec::new()).await
    }

    #[tokio::test(start_paused = true)]
    async fn hung_devices_hold_the_share_of_who_asked_for_them() {
        let (pool, devices) = start(4, Duration::from_secs(30));
        let share = Arc::new(Semaphore::new(2));
        for _ in 0..2 {
            assert_eq!(run_of(&share, pool.clone(), 1).await, Reply::check(Sense::TIMEOUT));
        }
        // Answered, but the threads still wait: no other device is asked in this share, though threads are free.
        assert_eq!((share.available_permits(), pool.threads.available_permits()), (0, 2));
        assert_eq!(run_of(&share, pool.clone(), 2).await, Reply::status(status::BUSY));
        devices.let_go();
        while share.available_permits() < 2 {
            std::thread::yield_now();
        }
    }

    #[tokio::test]
    async fn a_hung_device_holds_up_nobody_else() {
        let (pool, devices) = start(PER_DEVICE + 1, Duration::from_secs(600));
        let hung: Vec<_> = (0..8).map(|_| tokio::spawn(run(pool.clone(), 1))).collect();
        tokio::task::yield_now().await;
        for _ in 0..20 {
            assert_eq!(run(pool.clone(), 2).await, Reply::status(status::GOOD));
        }
        assert!(hung.iter().all(|task| !task.is_finished()));
        devices.let_go();
        for task in hung {
            assert_eq!(task.await.unwrap(), Reply::status(status::GOOD));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_gets_an_answer_at_the_deadline() {
        let (pool, devices) = start(4, Duration::from_secs(30));
        let hung: Vec<_> = (0..PER_DEVICE + 1).map(|_| tokio::spawn(run(pool.clone(), 1))).collect();
        let mut answers = Vec::new();
        for task in hung {
            answers.push(task.await.unwrap());
        }
        // Those that reached the device timed out there; the other one never reached it and may be repeated.
        assert_eq!(answers.iter().filter(|a| **a == Reply::check(Sense::TIMEOUT)).count(), PER_DEVICE);
        assert_eq!(answers.iter().filter(|a| **a == Reply::status(status::BUSY)).count(), 1);
        devices.let_go();
    }
}
