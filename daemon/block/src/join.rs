//! Several requests of one task at the same time.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

/// Runs all to their ends; their results in the order of the futures. For a few futures: each wake-up polls all that are not
/// done yet.
pub async fn each<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut running: Vec<(usize, Pin<Box<F>>)> = futures.into_iter().map(Box::pin).enumerate().collect();
    let mut done = Vec::with_capacity(running.len());
    poll_fn(|cx| {
        running.retain_mut(|(place, future)| match future.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(output) => {
                done.push((*place, output));
                false
            }
        });
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, output)| output).collect()
}
