// graphile-worker. See program.mjs for the commands.

import { Logger, makeWorkerUtils, run } from "graphile-worker";
import { inputEnds, main, pace, ready } from "./program.mjs";

const logger = new Logger(() => (level, message) => {
  if (level === "error" || level === "warning") console.error(`graphile-worker: ${message}`);
});

async function withUtils(url, use) {
  const utils = await makeWorkerUtils({ connectionString: url, logger });
  try {
    await use(utils);
  } finally {
    await utils.release();
  }
}

await main({
  prepare: (url) => withUtils(url, (utils) => utils.migrate()),

  enqueue: (url, settings, count) =>
    withUtils(url, (utils) =>
      utils.addJobs(Array.from({ length: count }, (_, n) => ({ identifier: "noop", payload: { n } }))),
    ),

  async work(url, settings, starts) {
    const runner = await run({
      preset: { worker: { connectionString: url, logger, ...settings } },
      noHandleSignals: true,
      taskList: {
        async noop(payload) {
          starts.add(payload.n);
        },
      },
    });
    ready();
    await inputEnds();
    await runner.stop();
  },

  produce: (url) => withUtils(url, (utils) => pace((n) => utils.addJob("noop", { n }))),
});
