// What the programs of npm's job queues share: `prepare|enqueue|work|produce URL SETTINGS [COUNT|STARTS]`, the protocol
// of `programs/_program.py` and `marks.py`. process.hrtime is CLOCK_MONOTONIC, as Python's time.monotonic_ns is.

import { writeFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

class Starts {
  #path;
  #pairs = [];
  #reported = 0;
  #timer;

  constructor(path) {
    this.#path = path;
    this.#timer = setInterval(() => this.#report(), 10);
  }

  add(number) {
    this.#pairs.push(BigInt(number), process.hrtime.bigint());
  }

  #report() {
    const count = this.#pairs.length / 2;
    if (count !== this.#reported) console.log(`started ${count}`);
    this.#reported = count;
  }

  close() {
    clearInterval(this.#timer);
    writeFileSync(this.#path, new Uint8Array(BigInt64Array.from(this.#pairs).buffer));
  }
}

export function ready() {
  console.log("ready");
}

export async function inputEnds() {
  for await (const _ of process.stdin);
}

// `insert` resolves when the commit is known.
export async function pace(insert) {
  ready();
  for await (const line of createInterface({ input: process.stdin })) {
    const [count, gap, first] = line.split(" ").map(Number);
    const times = [];
    let nextAt = performance.now();
    for (let number = first; number < first + count; number++) {
      await sleep(Math.max(0, nextAt - performance.now()));
      const sentAt = process.hrtime.bigint();
      await insert(number);
      times.push(`${number} ${sentAt} ${process.hrtime.bigint()}`);
      nextAt += gap * 1000;
    }
    console.log(times.join("\n"));
  }
}

export async function main({ prepare, enqueue, work, produce }) {
  const [command, url, settings, more] = process.argv.slice(2);
  const common = [url, JSON.parse(settings)];
  if (command === "prepare") await prepare(...common);
  else if (command === "enqueue") await enqueue(...common, Number(more));
  else if (command === "produce") await produce(...common);
  else {
    const starts = new Starts(more);
    await work(...common, starts);
    starts.close();
  }
}
