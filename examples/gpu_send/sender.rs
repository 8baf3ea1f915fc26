//! The sending side: registers the memory and writes it into the peer's buffer.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use dmabuf_rdma::mr::MemoryRegion;
use dmabuf_rdma::verbs::{CompletionQueue, Context, Operation, ProtectionDomain, QueuePair, WorkRequest};

use crate::Result;
use crate::peer::{Hello, Offer, Sent, Verdict, receive, send};
use crate::source::Source;

/// Bytes per work request, and the timeout of one.
const MESSAGE: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(30);

pub fn run(context: &Context, source: &Source, address: &str) -> Result<()> {
    let domain = ProtectionDomain::new(context)?;
    let regions: Vec<MemoryRegion> = source
        .parts
        .iter()
        .map(|(buffer, range)| Ok(MemoryRegion::builder(&domain, buffer).range(range.clone()).register()?))
        .collect::<Result<_>>()?;
    let size = regions.iter().map(MemoryRegion::len).sum();
    let paths: Vec<_> = regions.iter().map(|region| region.path().to_string()).collect();
    println!(
        "{:>9}  {}: {size} bytes, written by {}, in {} dma-bufs on {} by {}",
        "source",
        source.name,
        source.written_by,
        regions.len(),
        context.device_name(),
        paths.join(" and "),
    );

    let queue = CompletionQueue::new(context, 16)?;
    let pair = QueuePair::new(&domain, &queue, &queue, Default::default())?;
    let mut stream = TcpStream::connect(address)?;
    let endpoint = pair.endpoint().ok_or("a pair made here has one")?;
    send(&mut stream, &Hello { endpoint, size })?;
    let offer: Offer = receive(&mut stream)?;
    pair.connect(&offer.endpoint)?;

    let start = Instant::now();
    let mut at = 0;
    for region in &regions {
        for offset in (0..region.len()).step_by(MESSAGE as usize) {
            let length = MESSAGE.min(region.len() - offset);
            let remote = offer.region.slice(at..at + length)?.addr()?;
            let elements = [region.sge(offset..offset + length)?];
            pair.post(WorkRequest::new(at, Operation::Write { remote }, &elements).signaled())?;
            queue.wait(TIMEOUT)?.success()?;
            at += length;
        }
    }
    let took = start.elapsed().as_secs_f64();
    println!(
        "{:>9}  {size} bytes in {took:.2} s, {:.0} MiB/s",
        "sent",
        size as f64 / took / f64::from(1 << 20)
    );

    send(&mut stream, &Sent { digest: source.digest })?;
    let verdict: Verdict = receive(&mut stream)?;
    if verdict.digest != source.digest {
        return Err(
            format!("the peer has {:032x}, but {:032x} was sent", verdict.digest, source.digest).into()
        );
    }
    println!("{:>9}  the peer's digest {:032x} equals that of the sent bytes", "verified", verdict.digest);
    Ok(())
}
